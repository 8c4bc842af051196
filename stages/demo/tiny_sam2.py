"""A SAM2 of 1.4 million random weights in the official classes and file formats, for the demo."""

from pathlib import Path
from typing import Any

import torch

_IMAGE_SIZE = 128
_TEMPLATE = "sam2.1_hiera_t"
_TRUNK_WIDTH = 16
_WIDTH = 64
_MEMORY_WIDTH = 16


def build_tiny_sam2(out: Path, seed: int) -> None:
    """Write `tiny.yaml` and `tiny.pt` to a folder.

    The configuration is the packaged sam2.1_hiera_t with smaller widths, fewer blocks and 128-pixel
    input; the checkpoint is {"model": state dict}, like the official ones.

    Args:
        out: Output folder; created if missing.
        seed: Random seed of the weights.
    """
    # Imported here, so that training and sampling with existing models do not need sam2.
    from omegaconf import OmegaConf

    from stages.sam2_tracking.build import build_sam2, official_configs

    out.mkdir(parents=True, exist_ok=True)
    config = OmegaConf.load(official_configs()[_TEMPLATE])
    for key, value in _overrides().items():
        OmegaConf.update(config, f"model.{key}", value)
    config_path = out / "tiny.yaml"
    text = OmegaConf.to_yaml(config)
    config_path.write_text(f"# @package _global_\n{text}", encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_sam2(config_path, None)
        _randomise(model)
    torch.save({"model": model.state_dict()}, out / "tiny.pt")


def _overrides() -> dict[str, Any]:
    grid = [_IMAGE_SIZE // 16] * 2
    trunk = "image_encoder.trunk"
    neck = "image_encoder.neck"
    attention = "memory_attention"
    memory = "memory_encoder"
    return {
        "image_size": _IMAGE_SIZE,
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
    "present", since an absent object blanks the memory.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gamma"):
                weight.normal_(std=0.1)
            elif "pos_embed" in name or (name.endswith(".bias") and not weight.any()):
                weight.normal_(std=0.02)
        score_head: Any = model.sam_mask_decoder
        score_head.pred_obj_score_head.layers[-1].bias.fill_(3.0)
