"""A small CogVideoX VAE with the true compression (4x in time, 8x in space)."""

import torch
from diffusers import AutoencoderKLCogVideoX

_WIDTHS = (16, 24, 32, 32)
_LATENT_CHANNELS = 16


def build_tiny_vae(seed: int) -> AutoencoderKLCogVideoX:
    """A VAE with random weights, in evaluation mode.

    Args:
        seed: Seeds the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=_WIDTHS,
            latent_channels=_LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=4,
            scaling_factor=1.0,
        )
    return vae.eval()
