"""CogVideoX's noise schedule, v-prediction target and diffusion loss, as pure functions.

Zero-terminal-SNR schedule, v-prediction. The training loss weights the error on x0 by
1 / (1 - abar); since x0 = sqrt(abar) x_t - sqrt(1 - abar) v, this equals the mean squared error on
v, which is what is computed (no division by a number near zero). Everything stays in float32: in
bfloat16 abar rounds to 1 at the first timesteps, and the loss would vanish there.

Legend: B clip, F latent frame, C channel, H W latent, S timestep of the schedule.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_REQUIRED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
)


def cumulative_alphas(scheduler_config: Mapping[str, Any]) -> Tensor:
    """abar at every timestep, from the pipeline's scheduler config: float64 [S].

    Scaled-linear betas, shifted by `snr_shift_scale` (3.0 in CogVideoX-2b, 1.0 in 5b) and, with
    `rescale_betas_zero_snr`, rescaled so that the last timestep is pure noise.

    Raises:
        ValueError: a setting is missing, or has a value that no CogVideoX was trained with.

    Source: diffusers' CogVideoXDDIMScheduler; Lin et al., arXiv 2305.08891, algorithm 1.
    """
    missing = [name for name in _REQUIRED if name not in scheduler_config]
    if missing:
        raise ValueError(f"the scheduler configuration lacks {', '.join(missing)}")
    for name, expected in (("beta_schedule", "scaled_linear"), ("prediction_type", "v_prediction")):
        if scheduler_config[name] != expected:
            raise ValueError(
                f"the scheduler's {name} is {scheduler_config[name]!r}; training supports only "
                f"{expected!r}, the value of every CogVideoX pipeline"
            )
    betas_S = (
        torch.linspace(
            math.sqrt(scheduler_config["beta_start"]),
            math.sqrt(scheduler_config["beta_end"]),
            scheduler_config["num_train_timesteps"],
            dtype=torch.float64,
        )
        ** 2
    )
    abar_S = torch.cumprod(1.0 - betas_S, dim=0)
    shift = scheduler_config["snr_shift_scale"]
    abar_S = abar_S / (shift + (1.0 - shift) * abar_S)
    if scheduler_config["rescale_betas_zero_snr"]:
        root_S = abar_S.sqrt()
        abar_S = ((root_S - root_S[-1]) * root_S[0] / (root_S[0] - root_S[-1])) ** 2
    return abar_S


def noisy_latents(clean_BFCHW: Tensor, noise_BFCHW: Tensor, abar_B: Tensor) -> Tensor:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, in the dtype of the arguments."""
    abar = _per_clip(abar_B, clean_BFCHW)
    return abar.sqrt() * clean_BFCHW + (1.0 - abar).sqrt() * noise_BFCHW


def velocity(clean_BFCHW: Tensor, noise_BFCHW: Tensor, abar_B: Tensor) -> Tensor:
    """Prediction target v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    abar = _per_clip(abar_B, clean_BFCHW)
    return abar.sqrt() * noise_BFCHW - (1.0 - abar).sqrt() * clean_BFCHW


def diffusion_loss(
    predicted_BFCHW: Tensor, clean_BFCHW: Tensor, noise_BFCHW: Tensor, abar_B: Tensor
) -> Tensor:
    """Mean squared error on v of each clip: loss_B, 1 / (1 - abar) times the error on x0.

    Args:
        predicted_BFCHW: the model's velocity, any floating dtype.
        clean_BFCHW: scaled latents x0, float32 (float64 in tests).
        noise_BFCHW: eps, same dtype as x0.
        abar_B: abar at each clip's timestep, same dtype as x0.
    """
    target_BFCHW = velocity(clean_BFCHW, noise_BFCHW, abar_B)
    return (predicted_BFCHW.to(target_BFCHW.dtype) - target_BFCHW).square().flatten(1).mean(1)


class VelocitySchedule:
    """The schedule with v-prediction, in float32 on a device (`NoiseSchedule`)."""

    def __init__(self, scheduler_config: Mapping[str, Any], device: torch.device) -> None:
        """Compute the schedule.

        Raises:
            ValueError: As `cumulative_alphas`.
        """
        self._abar_S = cumulative_alphas(scheduler_config).float().to(device)

    def signal(self, timestep_B: Tensor) -> Tensor:
        """abar_B."""
        return self._abar_S[timestep_B]

    def noisy_latents(self, clean_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """See `noisy_latents`."""
        return noisy_latents(clean_BFCHW, noise_BFCHW, self.signal(timestep_B))

    def diffusion_loss(
        self, predicted_BFCHW: Tensor, clean_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor
    ) -> Tensor:
        """See `diffusion_loss`."""
        abar_B = self.signal(timestep_B)
        return diffusion_loss(predicted_BFCHW, clean_BFCHW, noise_BFCHW, abar_B)

    def model_timestep(self, timestep_B: Tensor) -> Tensor:
        """The timestep itself: int64."""
        return timestep_B


def _per_clip(abar_B: Tensor, like_BFCHW: Tensor) -> Tensor:
    return abar_B.to(like_BFCHW).view(-1, *[1] * (like_BFCHW.ndim - 1))
