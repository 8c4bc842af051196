"""Latents of any student's VAE: encoding for a store, and samples from the stored posterior.

Legend: B batch (always 1), C channel, T frame, F latent frame, H W pixels or latent grid.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_float16(values: Tensor) -> np.ndarray:
    """Convert to a contiguous float16 array on the host."""
    return np.ascontiguousarray(values.to("cpu", torch.float16).numpy())


def encode_posterior(vae: Any, pixels_BCTHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a VAE's posterior, float16 [F, C, H, W] each."""
    posterior = vae.encode(pixels_BCTHW.to(vae.device, vae.dtype)).latent_dist
    mean_CFHW, std_CFHW = posterior.mean[0], posterior.std[0]
    return to_float16(mean_CFHW.transpose(0, 1)), to_float16(std_CFHW.transpose(0, 1))


def sample_posterior(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """Sample from the VAE's posterior: mean + std * noise, float32."""
    return mean.float() + std.float() * torch.randn(mean.shape, generator=generator)
