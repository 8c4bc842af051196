"""Rotary tables of the transformer, as in diffusers' pipelines."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor


def rotary_positions(
    transformer: Mapping[str, Any],
    num_latents: int,
    latent_height: int,
    latent_width: int,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of the rotary embedding, each [tokens, head_dim]; None for sin-cos models.

    Args:
        transformer: the transformer's configuration.
        num_latents: latent frames, padding included.

    Source: CogVideoXPipeline._prepare_rotary_positional_embeddings.
    """
    config = transformer
    if not config["use_rotary_positional_embeddings"]:
        return None
    patch = config["patch_size"]
    grid = (latent_height // patch, latent_width // patch)
    base_height, base_width = config["sample_height"] // patch, config["sample_width"] // patch
    if config["patch_size_t"] is None:
        cosine, sine = get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=get_resize_crop_region_for_grid(grid, base_width, base_height),
            grid_size=grid,
            temporal_size=num_latents,
            device=device,
        )
    else:
        cosine, sine = get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=None,
            grid_size=grid,
            temporal_size=-(-num_latents // config["patch_size_t"]),
            grid_type="slice",
            max_size=(base_height, base_width),
            device=device,
        )
    return cosine, sine
