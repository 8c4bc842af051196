"""A SAM2 that transformers can hold too, and how far rounding alone carries a tracker."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from stages.sam2_tracking.build import build_sam2

WIDTH = 128
MEMORY_WIDTH = 64  # transformers knows no other


@pytest.fixture(scope="session")
def nudged() -> Callable[[Any], Any]:
    """Copies a SAM2 model so that one memory value in a hundred is about a bfloat16 step off.

    Memories are kept in bfloat16. Two programs that are equal up to float32's rounding can differ
    in the last bit of some values; which ones depends on the processor, so no fixed bound holds.
    """

    def copy_of(model: Any) -> Any:
        model = copy.deepcopy(model)
        encode = model._encode_new_memory
        up_or_down = torch.Generator().manual_seed(0)

        def encode_off(**inputs: Any) -> Any:
            memory, positions = encode(**inputs)
            chance = torch.rand(memory.shape, generator=up_or_down)
            steps = (chance < 0.005).float() - (chance > 0.995).float()
            return memory * (1 + steps * 2**-8), positions

        model._encode_new_memory = encode_off
        return model

    return copy_of


@pytest.fixture(scope="module")
def wide_sam2(tiny_sam2: tuple[Path, Path]) -> Any:
    """The tiny SAM2 with wider memories and random weights."""
    config = OmegaConf.load(tiny_sam2[0]).model
    attention, memory = "memory_attention", "memory_encoder"
    for key in (
        "image_encoder.neck.d_model",
        "image_encoder.neck.position_encoding.num_pos_feats",
        f"{attention}.d_model",
        f"{attention}.layer.d_model",
        f"{attention}.layer.self_attention.embedding_dim",
        f"{attention}.layer.cross_attention.embedding_dim",
        f"{memory}.in_dim",
        f"{memory}.mask_downsampler.embed_dim",
        f"{memory}.fuser.layer.dim",
    ):
        OmegaConf.update(config, key, WIDTH)
    for key in (
        f"{attention}.layer.cross_attention.kv_in_dim",
        f"{memory}.out_dim",
        f"{memory}.position_encoding.num_pos_feats",
    ):
        OmegaConf.update(config, key, MEMORY_WIDTH)
    file = tiny_sam2[0].with_name("wide.yaml")
    OmegaConf.save({"model": config}, file)
    torch.manual_seed(0)
    model = build_sam2(file, None)
    for name, weight in model.named_parameters():
        if name.endswith("gamma"):
            weight.normal_(std=0.1)
        elif "pos_embed" in name or (name.endswith("bias") and not weight.any()):
            weight.normal_(std=0.02)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    return model
