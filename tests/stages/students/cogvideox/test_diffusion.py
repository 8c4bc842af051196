import math

import pytest
import torch

from stages.students.cogvideox.diffusion import (
    cumulative_alphas,
    diffusion_loss,
    noisy_latents,
    velocity,
)
from tests.stages.train_student.conftest import tiny_scheduler


def random_latents(seed):
    return torch.randn(
        4, 3, 2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("rescale", [True, False])
def test_schedule_equals_the_schedulers_own(shift, rescale):
    scheduler = tiny_scheduler(snr_shift_scale=shift, rescale_betas_zero_snr=rescale)
    ours = cumulative_alphas(scheduler.config)
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=1e-15)
    assert (ours[-1] == 0.0) == rescale


def test_noise_and_velocity_equal_the_schedulers_own_in_float64():
    scheduler = tiny_scheduler()
    clean, noise = random_latents(0), random_latents(1)
    timestep = torch.tensor([0, 1, 500, 999])
    abar = cumulative_alphas(scheduler.config)[timestep]
    torch.testing.assert_close(
        noisy_latents(clean, noise, abar), scheduler.add_noise(clean, noise, timestep)
    )
    torch.testing.assert_close(
        velocity(clean, noise, abar), scheduler.get_velocity(clean, noise, timestep)
    )


@pytest.mark.parametrize("timestep", [0, 1, 10, 500, 999])
def test_loss_equals_the_weighted_error_on_x0(timestep):
    """The official form: x0 from the prediction, squared error, weight 1 / (1 - abar)."""
    abar = cumulative_alphas(tiny_scheduler().config)[[timestep] * 4]
    clean, noise, predicted = random_latents(0), random_latents(1), random_latents(2)
    a = float(abar[0])
    noisy = math.sqrt(a) * clean + math.sqrt(1 - a) * noise
    x0 = math.sqrt(a) * noisy - math.sqrt(1 - a) * predicted
    expected_B = ((x0 - clean) ** 2 / (1 - a)).mean((1, 2, 3, 4))
    ours_B = diffusion_loss(predicted, clean, noise, abar)
    torch.testing.assert_close(ours_B, expected_B, rtol=1e-9, atol=0)


def test_loss_keeps_its_precision_where_bfloat16_would_lose_it():
    """At t = 0 the 5B schedule's abar rounds to 1 in bfloat16."""
    config = tiny_scheduler(snr_shift_scale=1.0).config
    abar = cumulative_alphas(config)[[0] * 4]
    clean, noise = random_latents(0), random_latents(1)
    predicted = velocity(clean, noise, abar) + 0.1
    wide = diffusion_loss(predicted, clean, noise, abar).mean()
    rounded = predicted.bfloat16()
    narrow = diffusion_loss(rounded, clean.float(), noise.float(), abar.float()).mean()
    assert float(wide) == pytest.approx(0.01)
    assert float(narrow) == pytest.approx(0.01, rel=0.01)
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
    ],
)
def test_other_schedules_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        cumulative_alphas(dict(tiny_scheduler().config) | change)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="lacks num_train_timesteps"):
        cumulative_alphas({"beta_start": 0.1})
