"""Tiny encoders of each family with random weights, in the files that users have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VJEPA2Config,
    VJEPA2Model,
)

from stages.clips import ClipsConfig

REGISTERS = 3
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
_SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(family: str) -> Any:
    """A model of a family as its official checkpoints have it."""
    torch.manual_seed(0)
    if family == "dinov2":
        return Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **_SMALL))
    if family == "dinov2_with_registers":
        config = Dinov2WithRegistersConfig(
            image_size=28, patch_size=14, num_register_tokens=REGISTERS, **_SMALL
        )
        return Dinov2WithRegistersModel(config)
    if family == "dinov3_vit":
        config = DINOv3ViTConfig(
            image_size=32,
            patch_size=8,
            num_register_tokens=REGISTERS,
            intermediate_size=32,
            **_SMALL,
        )
        return DINOv3ViTModel(config)
    if family == "vjepa2":
        config = VJEPA2Config(
            crop_size=32,
            patch_size=8,
            frames_per_clip=4,
            pred_hidden_size=24,
            pred_num_hidden_layers=1,
            pred_num_attention_heads=2,
            num_pooler_layers=1,
            **_SMALL,
        )
        return VJEPA2Model(config)
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        intermediate_size=32,
        use_mean_pooling=False,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        **_SMALL,
    )
    return VideoMAEForPreTraining(config)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from a family to the folder of its tiny model; not to be changed."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folder = folders[family] = tmp_path_factory.mktemp("encoders") / family
            build(family).save_pretrained(folder)
            name = "video_preprocessor_config.json" if family == "vjepa2" else None
            content = {
                "do_resize": True,
                "do_center_crop": family != "dinov3_vit",
                "resample": 3,
                "rescale_factor": 1 / 255,
                "image_mean": MEAN,
                "image_std": STD,
            }
            (folder / (name or "preprocessor_config.json")).write_text(json.dumps(content))
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def clips() -> ClipsConfig:
    return ClipsConfig(path=Path("unused"), num_frames=9, height=48, width=64, fps=8.0)
