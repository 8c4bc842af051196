"""The image encoder in bands of windows equals sam2's own, and holds less."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.sam2_tracking import encoder_memory
from stages.sam2_tracking.build import build_sam2

SIZE = 128


@pytest.fixture(scope="module")
def model(tiny_sam2: tuple[Path, Path]) -> Any:
    return build_sam2(*tiny_sam2)


def images(num_frames: int, size: int = SIZE) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.randn(num_frames, 3, size, size, generator=noise)


def as_in_sam2(model: Any) -> Any:
    """A copy of the model with sam2's own image encoder."""
    model = copy.deepcopy(model)
    for block in model.image_encoder.trunk.blocks:
        vars(block).pop("forward", None)
    neck = model.image_encoder.neck
    neck.position_encoding = neck.position_encoding.positions
    return model


@pytest.mark.parametrize("num_frames", [1, 2])
@torch.inference_mode()
def test_bands_of_windows_change_rounding_only(
    num_frames: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of windows at a time: all windowed blocks, pooling ones too, run in several bands."""
    monkeypatch.setattr(encoder_memory, "_TOKENS_PER_BAND", 1)
    ours = model.forward_image(images(num_frames))
    theirs = as_in_sam2(model).forward_image(images(num_frames))
    for mine, stock in zip(ours["backbone_fpn"], theirs["backbone_fpn"], strict=True):
        torch.testing.assert_close(mine, stock, atol=5e-6, rtol=1e-5)
    assert torch.equal(ours["vision_pos_enc"][-1], theirs["vision_pos_enc"][-1])
    for mine, stock in zip(ours["vision_pos_enc"], theirs["vision_pos_enc"], strict=True):
        assert mine.shape == stock.shape


@torch.inference_mode()
def test_a_last_band_that_is_not_a_whole_window_is_padded(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_memory, "_TOKENS_PER_BAND", 1)
    stock = as_in_sam2(model)
    for mine, theirs in zip(
        model.image_encoder.trunk.blocks, stock.image_encoder.trunk.blocks, strict=True
    ):
        rows = 2 * mine.window_size + 2 if mine.window_size else 8
        x_BHWC = torch.randn(1, rows, 16, mine.dim, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(mine(x_BHWC), theirs(x_BHWC), atol=5e-6, rtol=1e-5)


@torch.inference_mode()
def test_a_block_never_sees_more_than_its_band(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_memory, "_TOKENS_PER_BAND", 512)
    block = model.image_encoder.trunk.blocks[0]
    seen = []
    with block.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape)):
        model.forward_image(images(1))
    assert len(seen) == 2
    assert all(height * width == 512 for _, height, width, _ in seen)


@torch.inference_mode()
def test_positions_of_other_levels_take_no_memory(model: Any) -> None:
    *others, read = model.forward_image(images(1))["vision_pos_enc"]
    assert read.untyped_storage().nbytes() >= read.nbytes
    assert all(other.untyped_storage().nbytes() == other.itemsize for other in others)
