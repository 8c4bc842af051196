"""Contrast, saturation, sharpness and change of a video's frames.

Fine-tuning can wash videos out: lower contrast or saturation, blur, less motion. These scores show
it next to the others; none of them is better or worse by itself.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from stages.video_scores.score import Score

# Legend: T frame, H W pixels, C colour (RGB).

_LUMA_BT709 = np.array([0.2126, 0.7152, 0.0722])

APPEARANCE = (
    Score(
        name="brightness",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better=None,
        description="mean luma",
    ),
    Score(
        name="contrast",
        unit="1",
        lowest=0.0,
        highest=0.5,
        better=None,
        description="standard deviation of luma within a frame",
    ),
    Score(
        name="saturation",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better=None,
        description="largest minus smallest of red, green and blue, mean over pixels",
    ),
    Score(
        name="sharpness",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better=None,
        description="luma difference of neighbouring pixels, root mean square",
    ),
    Score(
        name="frame_difference",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better=None,
        description="luma difference of consecutive frames, mean over pixels; 0 for a still video",
    ),
)

WASHED_OUT = 0.2
"""Relative loss of contrast, saturation or sharpness from which videos are reported."""


def washed_out(now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Describe which of contrast, saturation and sharpness fell by `WASHED_OUT` or more.

    Args:
        now: Means of the scores of some videos.
        before: Those of the same videos of the base model.

    Returns:
        Such as `contrast 0.21 -> 0.14`; empty if none fell so far.
    """
    return [
        f"{name} {before[name]:.3g} -> {now[name]:.3g}"
        for name in ("contrast", "saturation", "sharpness")
        if name in now and name in before and now[name] <= (1 - WASHED_OUT) * before[name]
        if before[name] > 0
    ]


def appearance_scores(frames_THWC: np.ndarray) -> dict[str, float]:
    """Compute the scores of `APPEARANCE`, each the mean over the frames.

    Args:
        frames_THWC: uint8 [T, H, W, 3]; H, W >= 2.

    Returns:
        Values by name; frame_difference is NaN for a single frame.
    """
    luma = [_luma(frame) for frame in frames_THWC]
    steps = [
        np.concatenate([np.diff(luma_HW, axis=0).ravel(), np.diff(luma_HW, axis=1).ravel()])
        for luma_HW in luma
    ]
    changes = [np.abs(after - before).mean() for before, after in pairwise(luma)]
    spread_T = [
        (frame.max(axis=-1).astype(np.float64) - frame.min(axis=-1)).mean() / 255
        for frame in frames_THWC
    ]
    return {
        "brightness": float(np.mean([luma_HW.mean() for luma_HW in luma])),
        "contrast": float(np.mean([luma_HW.std() for luma_HW in luma])),
        "saturation": float(np.mean(spread_T)),
        "sharpness": float(np.mean([np.sqrt((step**2).mean()) for step in steps])),
        "frame_difference": float(np.mean(changes)) if changes else float("nan"),
    }


def _luma(frame_HWC: np.ndarray) -> np.ndarray:
    """BT.709 luma of a uint8 frame: float64 [H, W], 0 to 1."""
    luma_HW: np.ndarray = frame_HWC @ (_LUMA_BT709 / 255)
    return luma_HW
