"""Latents for the transformer: temporal padding and image condition, as in diffusers' pipelines.

Legend: F latent frame, C channel, H W latent.
"""

import torch
from torch import Tensor


def pad_in_front(latents_FCHW: Tensor, frames: int) -> Tensor:
    """Repeat the first latent frame `frames` times before the clip.

    CogVideoX 1.5 has temporal patches of two; its pipeline generates the padding and discards it.
    """
    if frames == 0:
        return latents_FCHW
    return torch.cat([latents_FCHW[:1].expand(frames, -1, -1, -1), latents_FCHW])


def image_condition(image_1CHW: Tensor, num_latents: int) -> Tensor:
    """The first frame's latent followed by zeros: condition_FCHW, F = num_latents, padded."""
    zeros_FCHW = image_1CHW.new_zeros(num_latents - 1, *image_1CHW.shape[1:])
    return torch.cat([image_1CHW, zeros_FCHW])
