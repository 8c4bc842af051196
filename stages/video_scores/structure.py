"""Structure in motion, from SAM2's tracks of a video's subject.

The tracks are those of stage one: a mask of every frame in both directions, and the Local Gram Flow
of the memory features. A subject whose structure holds together is kept by the tracker, returns to
its mask when tracked back, changes its area and outline smoothly, and its parts match themselves in
the next frame with little doubt. A still video does all of this best, so motion is measured too.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.local_gram_flow import (
    flow_entropy,
    implied_motion,
)
from stages.video_scores.score import Score

# Legend: T frame, P = T - 1 pairs of frames, M N mask pixels, H W token grid, K neighbour.

_TURNS = 17
_LARGEST_TURN = math.radians(24)
"""Rotations between two frames that are tried when outlines are compared: 3 degrees apart."""

STRUCTURE = (
    Score(
        name="subject_kept",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="fraction of frames on which both tracks see the subject",
    ),
    Score(
        name="cycle_consistency",
        unit="IoU",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="overlap of the forward and the backward mask, mean over the frames seen",
    ),
    Score(
        name="area_jitter",
        unit="1/frame^2",
        lowest=0.0,
        highest=math.inf,
        better="lower",
        description="second difference of the log of the mask's area, mean of its size; 0 for a "
        "subject that keeps its size or grows at a constant rate",
    ),
    Score(
        name="shape_stability",
        unit="IoU",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="overlap of consecutive masks after the best shift, scale and rotation",
    ),
    Score(
        name="flow_entropy",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="lower",
        description="entropy of the Gram flow of the subject's tokens, divided by that of a "
        "uniform choice among the neighbours",
    ),
    Score(
        name="subject_motion",
        unit="frame heights/s",
        lowest=0.0,
        highest=math.inf,
        better=None,
        description="speed of the subject's tokens relative to the background's median, root mean "
        "square; 0 for a still video",
    ),
    Score(
        name="camera_motion",
        unit="frame heights/s",
        lowest=0.0,
        highest=math.inf,
        better=None,
        description="speed of the background's median flow",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SubjectTracks:
    """The tracks of a video's subject, as stage one stores them."""

    forward_TMN: np.ndarray
    """bool masks of the forward track."""
    backward_TMN: np.ndarray | None
    """bool masks of the backward track; None if there was no backward pass."""
    valid_T: np.ndarray
    """bool: every track sees the subject."""
    similarities_PHWK: Tensor
    """The Gram flow to the next frame, before the softmax."""
    fps: float
    """Frames per second."""


def structure_scores(tracks: SubjectTracks, *, temperature: float) -> dict[str, float]:
    """Compute the scores of `STRUCTURE` for one video.

    Args:
        tracks: Tracks of its subject.
        temperature: Temperature of the softmax over neighbours.

    Returns:
        Values by name; NaN where no frames allow one, such as the cycle consistency of a subject
        that is never seen by both tracks.
    """
    valid_T = tracks.valid_T & tracks.forward_TMN.any(axis=(1, 2))
    return {
        "subject_kept": float(tracks.valid_T.mean()),
        "cycle_consistency": _cycle_consistency(tracks),
        "area_jitter": _area_jitter(tracks.forward_TMN, valid_T),
        "shape_stability": _shape_stability(tracks.forward_TMN, valid_T),
        **_flow_scores(tracks, temperature),
    }


def _cycle_consistency(tracks: SubjectTracks) -> float:
    if tracks.backward_TMN is None:
        return math.nan
    overlaps = [
        iou(forward_MN, backward_MN)
        for forward_MN, backward_MN, is_valid in zip(
            tracks.forward_TMN, tracks.backward_TMN, tracks.valid_T, strict=True
        )
        if is_valid
    ]
    return _mean(overlaps)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two bool masks; NaN if both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else math.nan


def _area_jitter(masks_TMN: np.ndarray, valid_T: np.ndarray) -> float:
    log_area_T = np.log(np.maximum(masks_TMN.sum(axis=(1, 2)), 1).astype(np.float64))
    second_difference_T = np.abs(log_area_T[2:] - 2 * log_area_T[1:-1] + log_area_T[:-2])
    known_T = valid_T[2:] & valid_T[1:-1] & valid_T[:-2]
    return _mean(second_difference_T[known_T].tolist())


def _shape_stability(masks_TMN: np.ndarray, valid_T: np.ndarray) -> float:
    masks = [torch.from_numpy(mask_MN) for mask_MN in masks_TMN]
    return _mean(
        [
            _best_overlap(before, after)
            for (before, after), is_known in zip(
                pairwise(masks), valid_T[:-1] & valid_T[1:], strict=True
            )
            if is_known
        ]
    )


def _best_overlap(before_MN: Tensor, after_MN: Tensor) -> float:
    """IoU after moving `before` onto `after` by its centroid, its area and the best rotation."""
    centre_before, area_before = _centroid(before_MN)
    centre_after, area_after = _centroid(after_MN)
    scale = math.sqrt(area_after / area_before)
    height, width = after_MN.shape
    y_MN, x_MN = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    offset_MN2 = torch.stack([x_MN, y_MN], dim=-1) - centre_after
    turns = torch.linspace(-_LARGEST_TURN, _LARGEST_TURN, _TURNS, dtype=torch.float64)
    cos_R, sin_R = torch.cos(turns), torch.sin(turns)
    inverse_R22 = torch.stack(
        [torch.stack([cos_R, sin_R], dim=-1), torch.stack([-sin_R, cos_R], dim=-1)], dim=-2
    )
    source_RMN2 = torch.einsum("rij,mnj->rmni", inverse_R22, offset_MN2) / scale + centre_before
    # align_corners=True: -1 and 1 are the centres of the first and the last pixel.
    size_2 = torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=torch.float64)
    moved_RMN = F.grid_sample(
        before_MN.double().expand(_TURNS, 1, -1, -1),
        2 * source_RMN2 / size_2 - 1,
        mode="bilinear",
        align_corners=True,
    )[:, 0]
    moved_RMN = moved_RMN >= 0.5
    shared_R = (moved_RMN & after_MN).sum(dim=(1, 2))
    covered_R = (moved_RMN | after_MN).sum(dim=(1, 2))
    return float((shared_R / covered_R).max())


def _centroid(mask_MN: Tensor) -> tuple[Tensor, int]:
    """Mean (x, y) of a mask's pixels, and their number."""
    yx_N2 = mask_MN.nonzero().double()
    return yx_N2.mean(dim=0).flip(0), len(yx_N2)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairFlow:
    """The Gram flow of the subject's tokens from one frame to the next."""

    entropy_N: np.ndarray
    """Entropy of each token's flow, 0 to 1."""
    own_N2: np.ndarray
    """(x, y) velocity of each token relative to the camera, frame heights per second."""
    camera_2: np.ndarray
    """Median velocity of the background; 0 if the subject fills the frame."""


def pair_flows(tracks: SubjectTracks, *, temperature: float) -> list[PairFlow]:
    """Return the flows of the pairs of frames that both show the subject."""
    similarities_PHWK = tracks.similarities_PHWK.double()
    _, height, width, _ = similarities_PHWK.shape
    subject_THW = on_token_grid(tracks.forward_TMN, height, width)
    entropy_PHW = flow_entropy(similarities_PHWK[None], temperature)[0]
    tokens_PHW2 = implied_motion(similarities_PHWK[None], temperature)[0].double()
    velocity_PHW2 = tokens_PHW2 * (tracks.fps / height)
    found = []
    for pair, is_known in enumerate(tracks.valid_T[:-1] & tracks.valid_T[1:]):
        subject_HW = subject_THW[pair]
        if not is_known or not subject_HW.any():
            continue
        background_N2 = velocity_PHW2[pair][~subject_HW]
        camera_2 = background_N2.median(dim=0).values if len(background_N2) else torch.zeros(2)
        own_N2 = velocity_PHW2[pair][subject_HW] - camera_2
        found.append(
            PairFlow(
                entropy_N=entropy_PHW[pair][subject_HW].numpy(),
                own_N2=own_N2.numpy(),
                camera_2=camera_2.numpy(),
            )
        )
    return found


def _flow_scores(tracks: SubjectTracks, temperature: float) -> dict[str, float]:
    pairs = pair_flows(tracks, temperature=temperature)
    return {
        "flow_entropy": _mean([float(one.entropy_N.mean()) for one in pairs]),
        "subject_motion": _mean(
            [float(np.sqrt((one.own_N2**2).sum(axis=-1).mean())) for one in pairs]
        ),
        "camera_motion": _mean([float(np.hypot(*one.camera_2)) for one in pairs]),
    }


def on_token_grid(masks_TMN: np.ndarray, height: int, width: int) -> Tensor:
    """Return the tokens of a mask, bool [T, H, W]: those of which the mask covers at least half."""
    covered_THW = F.adaptive_avg_pool2d(torch.from_numpy(masks_TMN).double(), (height, width))
    return covered_THW >= 0.5


def _mean(values: list[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
