"""Features of a clip in memory against the stock predictor, and what is refused."""

# Legend: T frame, H W pixels, C channel.

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stages.clips import ClipsConfig, ClipSkipped, SubjectPrompt
from stages.extract_features.teacher.clip_features import fused_features
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.tracker import Tracker
from tests.stages.extract_features.teacher.grid_reference import gram_flow, on_grid


@pytest.fixture(scope="module")
def tracker(tiny_sam2: tuple[Path, Path]) -> Tracker:
    return Tracker(build_sam2(*tiny_sam2), precision="fp32")


def test_their_gram_flow_is_the_weighted_sum_of_the_stock_directions(
    tracker: Tracker,
    decoded_THWC: np.ndarray,
    mask_HW: np.ndarray,
    clips: ClipsConfig,
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> None:
    found = fused_features(
        tracker,
        decoded_THWC,
        SubjectPrompt(mask_HW=mask_HW),
        token_grid=clips.token_grid,
        forward_weight=0.3,
    )
    assert found.valid_T.all()
    forward_S, backward_S = (
        gram_flow(on_grid(raw, *clips.token_grid)) for raw in raw_directions("memory_attention")
    )
    np.testing.assert_allclose(
        gram_flow(found.features_THWG.double().numpy()),
        0.3 * forward_S + 0.7 * backward_S,
        atol=5e-6,
    )


def test_frames_after_the_subject_is_lost_are_zero_and_not_valid(
    tracker: Tracker,
    frames_THWC: np.ndarray,
    mask_HW: np.ndarray,
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    lose_subject(lambda frame, length: frame > 4)
    prompt = SubjectPrompt(mask_HW=mask_HW)
    found = fused_features(tracker, frames_THWC, prompt, token_grid=(2, 3))
    assert found.valid_T.tolist() == [True] * 5 + [False] * 4
    assert not found.features_THWG[5:].any()
    norm_THW = found.features_THWG[:5].norm(dim=-1).numpy()
    np.testing.assert_allclose(norm_THW, 1.0, atol=1e-5)
    lose_subject(lambda frame, length: frame > 0)
    with pytest.raises(ClipSkipped, match="subject_lost"):
        fused_features(tracker, frames_THWC, prompt, token_grid=(2, 3))


def test_frames_that_are_not_rgb_bytes_are_refused(
    tracker: Tracker, frames_THWC: np.ndarray
) -> None:
    prompt = SubjectPrompt(box_xyxy=(1, 1, 9, 9))
    for frames, message in (
        (frames_THWC / 255, "must be uint8 RGB"),
        (frames_THWC.transpose(0, 3, 1, 2), "must be uint8 RGB"),
        (frames_THWC[:1], "at least 2 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_features(tracker, frames, prompt, token_grid=(2, 3))
