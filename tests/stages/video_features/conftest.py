"""Tiny networks of each kind in the files that users have, and videos on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)

from stages.clips import ClipRecord, ClipsConfig, write_video
from tests.tiny_i3d import TinyI3D, save_tiny_i3d

SIDE = 32
FRAMES = 4


@pytest.fixture(scope="session")
def tiny_i3d(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyI3D]:
    """A TorchScript file, and the module it was made from."""
    path = tmp_path_factory.mktemp("torchscript") / "i3d_torchscript.pt"
    return path, save_tiny_i3d(path)


def _processor(folder: Path, name: str, **values: object) -> None:
    content = {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **values,
    }
    (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="session")
def tiny_videomae(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that saves a VideoMAE of a class with random weights."""
    classes = {
        "VideoMAEModel": VideoMAEModel,
        "VideoMAEForPreTraining": VideoMAEForPreTraining,
        "VideoMAEForVideoClassification": VideoMAEForVideoClassification,
    }

    def save(name: str = "VideoMAEModel") -> Path:
        torch.manual_seed(1)
        config = VideoMAEConfig(
            image_size=SIDE,
            patch_size=8,
            num_frames=FRAMES,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        )
        folder = tmp_path_factory.mktemp("models") / "tiny-videomae"
        classes[name](config).save_pretrained(folder)
        _processor(folder, "preprocessor_config.json", size={"shortest_edge": SIDE})
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_vjepa2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that saves a V-JEPA 2 of a class with random weights."""
    classes = {
        "VJEPA2Model": VJEPA2Model,
        "VJEPA2ForVideoClassification": VJEPA2ForVideoClassification,
    }

    def save(name: str = "VJEPA2Model") -> Path:
        torch.manual_seed(2)
        config = VJEPA2Config(
            crop_size=SIDE,
            patch_size=8,
            frames_per_clip=2 * FRAMES,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pred_hidden_size=24,
            pred_num_hidden_layers=1,
            pred_num_attention_heads=2,
            num_pooler_layers=1,
        )
        folder = tmp_path_factory.mktemp("models") / "tiny-vjepa2"
        classes[name](config).save_pretrained(folder)
        _processor(folder, "video_preprocessor_config.json", size={"shortest_edge": 36})
        return folder

    return save


@pytest.fixture
def clips() -> ClipsConfig:
    return ClipsConfig(path=Path("unused"), num_frames=9, height=48, width=64, fps=8.0)


@pytest.fixture
def write_clips(draw_frames: Callable[..., np.ndarray], tmp_path: Path) -> Callable[..., list]:
    """Returns a function that writes videos and returns their records."""

    def write(*keys: str, frames: int = 16, first_seed: int = 0) -> list[ClipRecord]:
        records = []
        for number, key in enumerate(keys):
            path = tmp_path / "videos" / f"{key}.mp4"
            write_video(path, draw_frames(frames, 48, 64, seed=first_seed + number), 8.0)
            records.append(ClipRecord(key=key, video=path))
        return records

    return write
