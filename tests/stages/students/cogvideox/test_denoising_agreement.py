"""Diffusion maths of training against the pipelines' own schedulers, for every model."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from stages.students.cogvideox.diffusion import cumulative_alphas, noisy_latents, velocity
from stages.students.cogvideox.inputs import pad_in_front
from stages.students.cogvideox.official_models import NAMES as OFFICIAL
from stages.students.official_models import official_configs

STEPS = 50
TIMESTEPS = (19, 259, 499, 739, 999)
"""Of fifty steps with trailing spacing: the last, and some before."""


@pytest.fixture(params=OFFICIAL)
def configs(request):
    return official_configs(request.param)


@pytest.fixture(params=[CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def scheduler(request, configs):
    made = request.param.from_config(configs.scheduler)
    made.set_timesteps(STEPS)
    return made


@pytest.fixture
def latents(configs):
    generator = torch.Generator().manual_seed(0)
    frames = 3 + configs.padding(3)
    shape = (len(TIMESTEPS), frames, 16, 4, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_noise_and_target_are_the_schedulers_own(configs, scheduler, latents):
    clean, noise = latents
    timesteps = torch.tensor(TIMESTEPS)
    abar = cumulative_alphas(configs.scheduler)[timesteps]
    torch.testing.assert_close(
        noisy_latents(clean, noise, abar), scheduler.add_noise(clean, noise, timesteps)
    )
    torch.testing.assert_close(
        velocity(clean, noise, abar), scheduler.get_velocity(clean, noise, timesteps)
    )


@pytest.mark.parametrize("index", range(len(TIMESTEPS)))
def test_a_perfect_prediction_leads_the_pipelines_step_to_the_clean_latents(
    configs, scheduler, latents, index
):
    clean, noise = (one[index : index + 1].float() for one in latents)
    timestep = TIMESTEPS[index]
    assert timestep in scheduler.timesteps
    abar = cumulative_alphas(configs.scheduler)[[timestep]].float()
    predicted = velocity(clean, noise, abar)
    noisy = noisy_latents(clean, noise, abar)
    if isinstance(scheduler, CogVideoXDDIMScheduler):
        found = scheduler.step(predicted, timestep, noisy, return_dict=True).pred_original_sample
    else:
        found = scheduler.step(predicted, None, timestep, None, noisy, return_dict=False)[1]
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_the_steps_end_at_the_clean_latents(configs, latents):
    """Fifty steps of the pipeline, each with the velocity that training would ask for there."""
    scheduler = CogVideoXDDIMScheduler.from_config(configs.scheduler)
    scheduler.set_timesteps(STEPS)
    clean, noise = (one[:1].float() for one in latents)
    abar_S = cumulative_alphas(configs.scheduler).float()
    sample = noise
    for timestep in scheduler.timesteps:
        abar = abar_S[timestep].reshape(1)
        # The noise that this sample holds, if it is on the way to `clean`.
        held = (sample - abar.sqrt() * clean) / (1.0 - abar).sqrt()
        sample = scheduler.step(velocity(clean, held, abar), timestep, sample).prev_sample
    torch.testing.assert_close(sample, clean, rtol=1e-3, atol=1e-3)


def test_padding_is_drawn_in_front_where_the_pipeline_drops_it(configs):
    frames = torch.arange(21.0).view(21, 1, 1, 1)
    padded = pad_in_front(frames, configs.padding(21))
    assert len(padded) % configs.patch_size_t == 0
    # `latents[:, additional_frames:]`, as the pipelines decode.
    torch.testing.assert_close(padded[configs.padding(21) :], frames)


def test_latents_are_decoded_by_the_inverse_of_their_scale(configs):
    """The pipelines decode latents / scaling_factor, and divide the image's by it in 1.5."""
    factor = configs.vae["scaling_factor"]
    assert configs.latent_scale / factor == 1.0
    inverted = configs.vae["invert_scale_latents"]
    assert inverted == (configs.patch_size_t == 2)
    assert configs.image_latent_scale == pytest.approx(1 / factor if inverted else factor)
