"""VBench's five dimensions of motion and consistency, as functions of frames, features and flows.

Written from Vchitect/VBench at 45e79ec: `vbench/{subject_consistency,background_consistency,
temporal_flickering,motion_smoothness,dynamic_degree}.py` and `static_filter.py`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from stages.video_scores.score import Score

# Legend: B batch, T frame, P pair of frames, H W pixels, C colour (RGB), D feature.

VBENCH = (
    Score(
        name="subject_consistency",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="cosine similarity of each frame's DINO feature to that of the first and of "
        "the previous frame, mean; 1 for a still video",
        source="VBench",
    ),
    Score(
        name="background_consistency",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="the same with CLIP's image feature; 1 for a still video",
        source="VBench",
    ),
    Score(
        name="temporal_flickering",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="1 - mean absolute difference of consecutive frames; 1 for a still video",
        source="VBench, on videos without motion only: on others it measures how much moves",
    ),
    Score(
        name="motion_smoothness",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="1 - mean absolute difference of every second frame from what AMT-S "
        "interpolates between its neighbours; 1 for a still video",
        source="VBench",
    ),
    Score(
        name="dynamic_degree",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better=None,
        description="whether enough pairs of frames have enough RAFT flow: 0 or 1, for videos of "
        "5 s and more the fraction of their pieces; a moving camera alone makes it 1",
        source="VBench",
    ),
)

FASTEST_OF_DYNAMIC = 0.05
"""Fraction of a frame's pixels whose mean speed decides on dynamic degree."""
FASTEST_OF_STATIC = 0.02
"""The same in the static filter."""

_DYNAMIC_PIXELS, _STATIC_PIXELS, _REFERENCE_SIDE = 6.0, 3.0, 256.0
"""Speed from which a pair moves, pixels per pair in frames whose shorter side is 256."""
_DYNAMIC_PAIRS, _STATIC_PAIRS, _REFERENCE_FRAMES = 4, 2, 16.0
"""Pairs that must move, or that may, in a video of 16 frames."""
_DYNAMIC_FPS = 8
"""Rate near which dynamic degree takes its frames, per second."""


def consistency(features_TD: np.ndarray) -> float:
    """Mean cosine similarity of each frame to the first and to the previous frame, 0 to 1.

    Each similarity is at least 0. VBench computes CLIP's features in float16 on a GPU; here they
    are float32.

    Args:
        features_TD: Features of the frames, of any length.

    Returns:
        NaN for a single frame, or where a feature is.
    """
    if len(features_TD) < 2:
        return math.nan
    features_TD = features_TD.astype(np.float64)
    # 1e-12: a feature of zeros has similarity 0, as in torch.nn.functional.normalize.
    lengths_T1 = np.maximum(np.linalg.norm(features_TD, axis=1, keepdims=True), 1e-12)
    unit_TD = features_TD / lengths_T1
    to_previous_P = (unit_TD[1:] * unit_TD[:-1]).sum(axis=1)
    to_first_P = (unit_TD[1:] * unit_TD[0]).sum(axis=1)
    return float((np.maximum(to_previous_P, 0) + np.maximum(to_first_P, 0)).mean() / 2)


def frame_difference(before_HWC: np.ndarray, after_HWC: np.ndarray) -> float:
    """Mean absolute difference of two uint8 frames, 0 to 255."""
    difference = np.maximum(before_HWC, after_HWC) - np.minimum(before_HWC, after_HWC)
    return int(difference.sum(dtype=np.int64)) / difference.size


def smoothness(differences_P: np.ndarray) -> float:
    """1 - the mean of `frame_difference`, as a fraction; NaN without pairs.

    Of consecutive frames it is temporal flickering, of frames and what is interpolated in their
    place it is motion smoothness.
    """
    return 1.0 - float(differences_P.mean()) / 255.0 if len(differences_P) else math.nan


def fastest_mean(flow_B2HW: Tensor, fraction: float) -> Tensor:
    """Mean speed of the fastest pixels of each flow, pixels: [B]; NaN where the flow is.

    Args:
        flow_B2HW: Flow from frame to frame, pixels.
        fraction: Fraction of the pixels, such as `FASTEST_OF_DYNAMIC`.
    """
    speeds_BN = torch.linalg.vector_norm(flow_B2HW.double(), dim=1).flatten(1)
    count = int(speeds_BN.shape[1] * fraction)
    return speeds_BN.topk(count, dim=1).values.mean(dim=1)


def dynamic_frames(frames: range, fps: float) -> range:
    """The frames that dynamic degree looks at: every second of a video of 16 per second."""
    return frames[:: max(1, round(fps / _DYNAMIC_FPS))]


def dynamic_degree(speeds_P: np.ndarray, *, height: int, width: int) -> float:
    """1 if enough pairs of consecutive frames move fast enough, else 0.

    Args:
        speeds_P: `fastest_mean` of the pairs of `dynamic_frames`, at `FASTEST_OF_DYNAMIC`.
        height: Of the frames, pixels.
        width: Of the frames, pixels.

    Returns:
        NaN where a speed is, and for fewer than three frames: of these VBench asks that no pair
        moves, and calls every video dynamic.
    """
    if len(speeds_P) < 2 or np.isnan(speeds_P).any():
        return math.nan
    fast = _DYNAMIC_PIXELS * (min(height, width) / _REFERENCE_SIDE)
    needed = round(_DYNAMIC_PAIRS * ((len(speeds_P) + 1) / _REFERENCE_FRAMES))
    return float((speeds_P > fast).sum() >= needed)


def is_static(
    speeds_P: np.ndarray, first_to_last: float, last_to_first: float, *, height: int, width: int
) -> bool:
    """Whether VBench's filter takes a video as one without motion.

    Args:
        speeds_P: `fastest_mean` of all pairs of consecutive frames, at `FASTEST_OF_STATIC`.
        first_to_last: The same from the first to the last frame.
        last_to_first: The same from the last to the first frame.
        height: Of the frames, pixels.
        width: Of the frames, pixels.

    Returns:
        False where a speed is NaN.
    """
    fast = _STATIC_PIXELS * (min(height, width) / _REFERENCE_SIDE)
    allowed = round(_STATIC_PAIRS * ((len(speeds_P) + 1) / _REFERENCE_FRAMES))
    return bool(
        not np.isnan(speeds_P).any()
        and (speeds_P > fast).sum() <= allowed
        and first_to_last <= fast * allowed * 2
        and last_to_first <= fast * allowed * 2
    )
