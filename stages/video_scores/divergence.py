"""How far a video's Gram flow is from that of a real clip of the same scene.

Only where both lay out the scene alike does a token of one correspond to that of the other: where
they share the first frame, as in image-to-video, or where one is made from the other.
"""

import math

import numpy as np
import torch
from torch import Tensor

from stages.local_gram_flow import gram_flow_loss
from stages.video_scores.score import Score
from stages.video_scores.structure import SubjectTracks, on_token_grid

# Legend: P pair of frames, H W token grid, K neighbour.

_RATE_TOLERANCE = 0.01
"""Relative difference of frame rates that are taken as equal, such as 24 and 23.976."""

DIVERGENCE = (
    Score(
        name="flow_divergence",
        unit="nats",
        lowest=0.0,
        highest=math.inf,
        better="lower",
        description="KL divergence of the video's Gram flow from the reference clip's, mean over "
        "the tokens of the clip's subject; 0 for the clip itself",
    ),
    Score(
        name="uniform_divergence",
        unit="nats",
        lowest=0.0,
        highest=math.inf,
        better=None,
        description="flow_divergence of a uniform choice among the neighbours, to compare with: a "
        "video above it fits the clip worse than a Gram flow without any information",
    ),
)
"""Scores against a reference clip."""


class NotComparableError(ValueError):
    """The frames or the tokens of two videos do not correspond."""


def divergence_scores(
    tracks: SubjectTracks, reference: SubjectTracks, *, temperature: float
) -> dict[str, float]:
    """Compute the scores of `DIVERGENCE` for one video.

    KL(P_reference || P_video) with P = softmax(similarities / temperature) over the neighbours
    inside the grid, as in the training loss `kl`; the mean over the tokens of the reference's
    subject in all pairs of frames on which the tracks of both videos see their subjects.

    Args:
        tracks: Tracks of the video.
        reference: Tracks of a clip of the same scene.
        temperature: Temperature of the softmax over neighbours.

    Returns:
        Values by name.

    Raises:
        NotComparableError: Lengths, token grids, windows or rates differ, or no pair of frames
            shows the subject in both videos.
    """
    flows = tracks.similarities_PHWK.double(), reference.similarities_PHWK.double()
    pairs, height, width, _ = flows[1].shape
    if flows[0].shape != flows[1].shape:
        raise NotComparableError(
            f"its Gram flow has {_described(flows[0])}, the reference clip's {_described(flows[1])}"
        )
    if not math.isclose(tracks.fps, reference.fps, rel_tol=_RATE_TOLERANCE):
        raise NotComparableError(
            f"it has {tracks.fps:g} frames per second, the reference clip {reference.fps:g}"
        )
    valid_T = torch.from_numpy(np.logical_and(tracks.valid_T, reference.valid_T))
    valid_P = valid_T[:-1] & valid_T[1:]
    subject_PHW = on_token_grid(reference.forward_TMN, height, width)[:pairs]
    if not (subject_PHW & valid_P[:, None, None]).any():
        raise NotComparableError("no pair of frames shows the subject in it and in its clip")

    def mean_divergence(video_PHWK: Tensor) -> float:
        return gram_flow_loss(
            video_PHWK[None],
            flows[1][None],
            temperature=temperature,
            divergence="kl",
            valid_BP=valid_P[None],
            token_weight_BPHW=subject_PHW[None],
        ).item()

    return {
        "flow_divergence": mean_divergence(flows[0]),
        "uniform_divergence": mean_divergence(torch.zeros_like(flows[0])),
    }


def _described(flow_PHWK: Tensor) -> str:
    pairs, height, width, neighbours = flow_PHWK.shape
    return f"{pairs} pairs of {height}x{width} tokens with {neighbours} neighbours"
