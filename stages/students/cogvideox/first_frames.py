"""First frames of CogVideoX image-to-video: noisy draws, encoded by the VAE.

Legend: N draw of noise, B batch (always 1), C channel, T frame, H W pixels or latent grid.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from stages.students.latents import encode_posterior

NOISE_LOG_MEAN, NOISE_LOG_STD = -3.0, 0.5
"""Log-normal noise level on image-to-video first frames, from the training of CogVideoX."""


def encode_draws(
    vae: Any, image_BCTHW: torch.Tensor, key: str, *, seed: int, draws: int
) -> dict[str, np.ndarray]:
    """Posterior of the image with each draw of noise: image_mean and image_std, [N, C, H, W]."""
    encoded = [
        encode_posterior(vae, noisy_BCTHW)
        for noisy_BCTHW in image_noise_draws(image_BCTHW, key, seed, draws)
    ]
    means, stds = zip(*encoded, strict=True)
    return {"image_mean": np.concatenate(means), "image_std": np.concatenate(stds)}


def image_noise_draws(
    image_BCTHW: torch.Tensor, key: str, seed: int, draws: int
) -> Iterator[torch.Tensor]:
    """Yield the image with N draws of CogVideoX's noise on first frames, sigma = exp(N(-3, 0.5)).

    CogVideoX draws sigma and noise anew at each step. Here they depend on the seed and the clip's
    key, not on the order of clips. The sigmas of a clip are stratified: one from each of N equally
    likely parts of the distribution, so that few draws cover its spread.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    for draw in range(draws):
        uniform = (draw + torch.rand((), generator=noise, dtype=torch.float64)) / draws
        normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float()
        sigma = torch.exp(NOISE_LOG_MEAN + NOISE_LOG_STD * normal)
        yield image_BCTHW + sigma * torch.randn(image_BCTHW.shape, generator=noise)
