"""A SAM2 of 1.4 million weights in the official classes and configuration format, for the demo."""

from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE = 128
"""Usual side of the square input, pixels."""
_TEMPLATE = "sam2.1_hiera_t"
_TRUNK_WIDTH = 16
_WIDTH = 64
_MEMORY_WIDTH = 16
_PLACE_BIAS = 3.0
"""A neighbouring token's memory then gets a fifth of the weight of a token's own."""


def write_tiny_config(file: Path, image_size: int = IMAGE_SIZE) -> None:
    """Write the configuration: sam2.1_hiera_t with smaller widths and fewer blocks."""
    # Imported here, so that training and sampling with existing models do not need sam2.
    from omegaconf import OmegaConf

    from stages.sam2_tracking.build import official_configs

    config = OmegaConf.load(official_configs()[_TEMPLATE])
    for key, value in _overrides(image_size).items():
        OmegaConf.update(config, f"model.{key}", value)
    file.write_text(f"# @package _global_\n{OmegaConf.to_yaml(config)}", encoding="utf-8")


def build_tiny_sam2(config: Path, seed: int) -> torch.nn.Module:
    """Build the model with random weights.

    Args:
        config: From `write_tiny_config`.
        seed: Random seed of the weights.
    """
    from stages.sam2_tracking.build import build_sam2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_sam2(config, None)
        _randomise(model)
    return model


def _overrides(image_size: int) -> dict[str, Any]:
    grid = [image_size // 16] * 2
    trunk = "image_encoder.trunk"
    neck = "image_encoder.neck"
    attention = "memory_attention"
    memory = "memory_encoder"
    return {
        "image_size": image_size,
        f"{trunk}.embed_dim": _TRUNK_WIDTH,
        f"{trunk}.stages": [1, 1, 2, 1],
        f"{trunk}.global_att_blocks": [3],
        f"{neck}.d_model": _WIDTH,
        f"{neck}.position_encoding.num_pos_feats": _WIDTH,
        f"{neck}.backbone_channel_list": [_TRUNK_WIDTH * 2**level for level in (3, 2, 1, 0)],
        f"{attention}.d_model": _WIDTH,
        f"{attention}.num_layers": 1,
        f"{attention}.layer.d_model": _WIDTH,
        f"{attention}.layer.dim_feedforward": _WIDTH,
        f"{attention}.layer.self_attention.embedding_dim": _WIDTH,
        f"{attention}.layer.self_attention.feat_sizes": grid,
        f"{attention}.layer.cross_attention.embedding_dim": _WIDTH,
        f"{attention}.layer.cross_attention.kv_in_dim": _MEMORY_WIDTH,
        f"{attention}.layer.cross_attention.feat_sizes": grid,
        f"{memory}.in_dim": _WIDTH,
        f"{memory}.out_dim": _MEMORY_WIDTH,
        f"{memory}.position_encoding.num_pos_feats": _MEMORY_WIDTH,
        f"{memory}.mask_downsampler.embed_dim": _WIDTH,
        f"{memory}.fuser.layer.dim": _WIDTH,
    }


def _randomise(model: torch.nn.Module) -> None:
    """Randomise the parameters that SAM2 initialises to (almost) zero, so that all of them matter.

    These are layer scales, position embeddings and biases. The object score is biased towards
    "present", since an absent object blanks the memory. Equal queries and keys differ by their
    rotary embedding alone, so that each token first attends to memories of its own place; with
    others, a short training finds no use for memories.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gamma"):
                weight.normal_(std=0.1)
            elif "pos_embed" in name or (name.endswith(".bias") and not weight.any()):
                weight.normal_(std=0.02)
        parts: Any = model
        parts.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
        for layer in parts.memory_attention.layers:
            layer.cross_attn_image.q_proj.bias.fill_(_PLACE_BIAS)
            layer.cross_attn_image.k_proj.bias.fill_(_PLACE_BIAS)
