"""Wan's flow matching with shift: noise levels, target and loss, as pure functions.

x = (1 - sigma) x0 + sigma eps, and the model predicts eps - x0. Timestep k of S, counted from 0, is
the level sigma = shift s / (1 + (shift - 1) s) with s = (k + 1) / S, so that uniform timesteps give
the shifted distribution of levels; the transformer receives S sigma. Everything stays in float32:
bfloat16 keeps eight bits, by which S sigma would be off by up to two.

Source: diffusers' FlowMatchEulerDiscreteScheduler, whose training levels these are; target and
unweighted loss as in a-r-r-o-w/finetrainers@01d612b, finetrainers/models/wan/base_specification.py.

Legend: B clip, F latent frame, C channel, H W latent, S timestep of the schedule.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_EULER = "FlowMatchEulerDiscreteScheduler"


def flow_shift(scheduler_config: Mapping[str, Any]) -> float:
    """The shift of the noise levels, from the pipeline's scheduler config.

    Raises:
        ValueError: the scheduler is not one of flow matching with a fixed shift.
    """
    if scheduler_config.get("_class_name") == _EULER:
        expected: dict[str, Any] = {"use_dynamic_shifting": False}
        name = "shift"
    else:
        expected = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        name = "flow_shift"
    for field, value in expected.items():
        if scheduler_config.get(field) != value:
            raise ValueError(
                f"the scheduler's {field} is {scheduler_config.get(field)!r}; training supports "
                f"only {value!r}, the value of every official pipeline"
            )
    shift = scheduler_config.get(name)
    if not isinstance(shift, int | float) or shift <= 0:
        raise ValueError(
            f"the scheduler's {name} must be a positive number, got {shift!r}; 3 is usual at 480p, "
            "5 at 720p"
        )
    return float(shift)


def noise_levels(num_timesteps: int, shift: float) -> Tensor:
    """sigma at every timestep, ascending: float64 [S], 1 at the last."""
    uniform_S = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return shift * uniform_S / (1.0 + (shift - 1.0) * uniform_S)


class FlowSchedule:
    """Noise levels in float32 on a device (`NoiseSchedule`)."""

    def __init__(self, scheduler_config: Mapping[str, Any], device: torch.device) -> None:
        """Compute the levels.

        Raises:
            ValueError: As `flow_shift`.
        """
        self._num_timesteps = int(scheduler_config["num_train_timesteps"])
        sigma_S = noise_levels(self._num_timesteps, flow_shift(scheduler_config))
        self._sigma_S = sigma_S.float().to(device)
        self._samples_at_integers = scheduler_config.get("_class_name") != _EULER

    def signal(self, timestep_B: Tensor) -> Tensor:
        """(1 - sigma)^2 / ((1 - sigma)^2 + sigma^2)."""
        sigma_B = self._sigma_S[timestep_B]
        power_B = (1.0 - sigma_B).square()
        return power_B / (power_B + sigma_B.square())

    def noisy_latents(self, clean_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma eps."""
        sigma = self._sigma_S[timestep_B].to(clean_BFCHW).view(-1, *[1] * (clean_BFCHW.ndim - 1))
        return (1.0 - sigma) * clean_BFCHW + sigma * noise_BFCHW

    def diffusion_loss(
        self, predicted_BFCHW: Tensor, clean_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor
    ) -> Tensor:
        """Mean squared error on eps - x0 of each clip."""
        target_BFCHW = noise_BFCHW - clean_BFCHW
        error_BFCHW = predicted_BFCHW.to(target_BFCHW.dtype) - target_BFCHW
        return error_BFCHW.square().flatten(1).mean(1)

    def model_timestep(self, timestep_B: Tensor) -> Tensor:
        """S sigma: float32, not an integer."""
        return self._num_timesteps * self._sigma_S[timestep_B]

    def first_at(self, boundary_ratio: float) -> int:
        """The first timestep at which WanPipeline calls the transformer for much noise.

        That is where the transformer's timestep reaches boundary_ratio S. UniPC rounds timesteps
        down first. Source: diffusers 0.42.1, pipelines/wan/pipeline_wan.py and
        schedulers/scheduling_unipc_multistep.py.
        """
        reached_S = self._num_timesteps * self._sigma_S
        if self._samples_at_integers:
            reached_S = reached_S.floor()
        return int((reached_S < boundary_ratio * self._num_timesteps).sum())
