"""Wan's noise, target and loss against diffusers' schedulers and float64."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stages.students.wan.flow import FlowSchedule, flow_shift, noise_levels

CPU = torch.device("cpu")
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def euler(shift=3.0):
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def schedule_of(scheduler):
    return FlowSchedule(dict(scheduler.config) | {"_class_name": type(scheduler).__name__}, CPU)


def random_latents(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(TIMESTEPS), 3, 4, 4, 6, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_levels_and_timesteps_are_the_schedulers_training_ones(shift):
    scheduler = euler(shift)
    levels_S = noise_levels(1000, shift)
    torch.testing.assert_close(levels_S.float().flip(0), scheduler.sigmas)
    every_S = torch.arange(1000)
    found_S = schedule_of(scheduler).model_timestep(every_S)
    torch.testing.assert_close(found_S.flip(0), scheduler.timesteps)
    assert found_S.dtype == torch.float32
    assert levels_S[-1] == 1.0


def test_unipc_and_euler_of_one_shift_are_one_schedule():
    unipc = schedule_of(UniPCMultistepScheduler(**UNIPC))
    assert torch.equal(unipc.signal(TIMESTEPS), schedule_of(euler()).signal(TIMESTEPS))


def test_noise_is_the_schedulers_own():
    scheduler, clean, noise = euler(), random_latents(0), random_latents(1)
    at_B = scheduler.timesteps.flip(0)[TIMESTEPS]
    torch.testing.assert_close(
        schedule_of(scheduler).noisy_latents(clean, noise, TIMESTEPS),
        scheduler.scale_noise(clean, at_B, noise),
    )


def test_the_loss_is_the_squared_error_on_noise_minus_data():
    """By hand in float64, with a prediction in bfloat16."""
    schedule = schedule_of(euler())
    clean, noise = random_latents(0), random_latents(1)
    predicted = random_latents(2).bfloat16()
    found_B = schedule.diffusion_loss(predicted, clean, noise, TIMESTEPS)
    error = predicted.double() - (noise.double() - clean.double())
    torch.testing.assert_close(found_B.double(), (error**2).mean((1, 2, 3, 4)))
    assert found_B.dtype == torch.float32


def test_signal_is_its_share_of_the_power():
    schedule = schedule_of(euler())
    clean, noise = torch.ones(1, 1), torch.zeros(1, 1)
    for timestep in TIMESTEPS:
        at = timestep[None]
        signal = schedule.noisy_latents(clean, noise, at) ** 2
        other = schedule.noisy_latents(noise, clean, at) ** 2
        torch.testing.assert_close(schedule.signal(at), (signal / (signal + other))[0])
    assert schedule.signal(torch.tensor([999])) == 0.0


@pytest.mark.parametrize("scheduler", [euler(), UniPCMultistepScheduler(**UNIPC)])
def test_perfect_predictions_lead_the_pipelines_steps_to_the_clean_latents(scheduler):
    clean, noise = random_latents(0)[:1], random_latents(1)[:1]
    scheduler.set_timesteps(20)
    sample = noise
    for timestep in scheduler.timesteps:
        # Constant along the straight path from noise to data.
        sample = scheduler.step(noise - clean, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_flow_sigmas": False}, "use_flow_sigmas is False"),
        ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ({"flow_shift": 0}, "flow_shift must be a positive number, got 0; 3 is usual"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting is True",
        ),
    ],
)
def test_other_schedules_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        flow_shift(UNIPC | changes)
