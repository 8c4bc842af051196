"""Masks of prompts and proposals of points, against sam2's own mask heads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.inputs import Sam2Prompt, normalise
from stages.sam2_tracking.tracker import Tracker, TrackRequest
from tests.bfloat16_attention import NEEDS_BFLOAT16_ATTENTION

SIZE = 128
POINTS = np.array([[54.0, 64.0], [10.0, 10.0], [100.5, 30.25], [64.0, 120.0], [3.0, 90.0]])


@pytest.fixture(scope="module")
def tracker(tiny_sam2: tuple[Path, Path]) -> Tracker:
    return Tracker(build_sam2(*tiny_sam2), precision="fp32")


@pytest.fixture
def frames_TSS3(draw_frames: Callable[..., np.ndarray]) -> np.ndarray:
    return draw_frames(3, SIZE, SIZE)


@pytest.fixture
def encoded(tracker: Tracker, frames_TSS3: np.ndarray) -> EncodedFrames:
    return tracker.encode(frames_TSS3)


def prompts() -> list[Sam2Prompt]:
    mask_11SS = torch.zeros(1, 1, SIZE, SIZE)
    mask_11SS[..., 30:90, 20:60] = 1
    return [
        Sam2Prompt(mask_11SS=mask_11SS),
        Sam2Prompt(
            points_1P2=torch.tensor([[[18.0, 32.0], [62.0, 98.0]]]),
            point_labels_1P=torch.tensor([[2, 3]], dtype=torch.int32),
        ),
        Sam2Prompt(
            points_1P2=torch.tensor([[[54.0, 64.0]]]),
            point_labels_1P=torch.tensor([[1]], dtype=torch.int32),
        ),
    ]


@torch.inference_mode()
def stock_click(
    model: Any, frame_SS3: np.ndarray, point: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The three masks and their predicted IoU of a click on an image, by sam2's own SAM heads."""
    outputs = model.forward_image(normalise(frame_SS3[None], torch.device("cpu")))
    _, vision_feats, _, sizes = model._prepare_backbone_features(outputs)
    vision_feats[-1] = vision_feats[-1] + model.no_mem_embed
    maps = [
        feats.permute(1, 2, 0).view(1, -1, *size)
        for feats, size in zip(vision_feats, sizes, strict=True)
    ]
    clicks = {
        "point_coords": torch.tensor(point, dtype=torch.float32)[None, None],
        "point_labels": torch.ones(1, 1, dtype=torch.int32),
    }
    logits, _, ious, *_ = model._forward_sam_heads(
        maps[-1], clicks, high_res_features=maps[:-1], multimask_output=True
    )
    return logits[0], ious[0]


def test_proposals_equal_clicks_on_an_image(
    tracker: Tracker, encoded: EncodedFrames, frames_TSS3: np.ndarray
) -> None:
    proposals = tracker.propose_masks(encoded, 1, torch.from_numpy(POINTS), points_per_batch=2)
    assert proposals.logits.shape == (5, 3, 32, 32)
    assert proposals.predicted_iou.shape == (5, 3)
    for n, point in enumerate(POINTS):
        logits, ious = stock_click(tracker.model, frames_TSS3[1], point)
        torch.testing.assert_close(proposals.logits[n], logits, atol=5e-6, rtol=0)
        torch.testing.assert_close(proposals.predicted_iou[n], ious, atol=5e-6, rtol=0)
    assert proposals.logits.std() > 1e-3
    assert (proposals.logits[0] - proposals.logits[1]).abs().max() > 1e-3


def test_proposals_do_not_depend_on_the_batch(tracker: Tracker, encoded: EncodedFrames) -> None:
    points_N2 = torch.from_numpy(POINTS)
    together = tracker.propose_masks(encoded, 0, points_N2)
    single = tracker.propose_masks(encoded, 0, points_N2, points_per_batch=1)
    torch.testing.assert_close(together.logits, single.logits, atol=5e-6, rtol=0)
    torch.testing.assert_close(together.predicted_iou, single.predicted_iou, atol=5e-6, rtol=0)


@NEEDS_BFLOAT16_ATTENTION
def test_proposals_are_float32_whatever_the_arithmetic(
    tiny_sam2: tuple[Path, Path], frames_TSS3: np.ndarray
) -> None:
    rough = Tracker(build_sam2(*tiny_sam2), precision="bf16")
    proposals = rough.propose_masks(rough.encode(frames_TSS3), 0, torch.from_numpy(POINTS))
    assert proposals.logits.dtype == proposals.predicted_iou.dtype == torch.float32


def test_masks_on_a_frame_are_those_that_tracks_begin_with(
    tracker: Tracker, encoded: EncodedFrames
) -> None:
    masks_NHW = tracker.masks_on_frame(encoded, 1, prompts())
    assert masks_NHW.shape == (3, 32, 32) and masks_NHW.dtype == torch.float32
    for mask_HW, prompt in zip(masks_NHW, prompts(), strict=True):
        request = TrackRequest(encoded=encoded, prompt=prompt, order=(1, 2))
        (first,) = next(tracker.track([request]))
        assert torch.equal(mask_HW, first.mask_logits_HW)


def test_a_tracked_mask_becomes_a_prompt_as_the_stock_predictor_enlarges_it(
    tracker: Tracker,
) -> None:
    logits_HW = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    prompt: Any = tracker.prompt_from_logits(logits_HW)
    # As sam2's own post-processing brings masks to the size of the video.
    enlarged = torch.nn.functional.interpolate(
        logits_HW[None, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False
    )
    assert torch.equal(prompt.mask_11SS, (enlarged > 0).float())


def test_an_empty_mask_is_no_prompt(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match="the mask is empty"):
        tracker.prompt_from_logits(torch.full((32, 32), -1024.0))
