"""The groups of scores, and the scores that need nothing but a video's frames."""

from collections.abc import Collection, Mapping

import numpy as np

from stages.config import FrameScoreGroup, ScoreGroup
from stages.video_scores.appearance import APPEARANCE, appearance_scores
from stages.video_scores.divergence import DIVERGENCE
from stages.video_scores.figures import FIGURES, NoFigureError, figure_scores, kind_in_prompt
from stages.video_scores.score import Score
from stages.video_scores.structure import STRUCTURE
from stages.video_scores.vbench.dimensions import VBENCH
from stages.video_scores.vbench.measure import vbench_scores
from stages.video_scores.vbench.networks import NO_NETWORKS, VBenchNetworks

SCORES: Mapping[ScoreGroup, tuple[Score, ...]] = {
    "structure": STRUCTURE + DIVERGENCE,
    "figures": FIGURES,
    "vbench": VBENCH,
    "appearance": APPEARANCE,
}
"""The scores of each group, in the order of the tables; those of `DIVERGENCE` need a reference."""

FRAME_SCORES: tuple[FrameScoreGroup, ...] = ("figures", "vbench", "appearance")
"""Groups that are computed from a video's frames."""

NETWORK_SCORES = frozenset(score.name for score in VBENCH) - {"temporal_flickering"}
"""Scores among them that need a network, which only an evaluation loads."""


def frame_scores(
    frames_THWC: np.ndarray,
    groups: Collection[str],
    *,
    prompt: str | None,
    fps: float,
    networks: VBenchNetworks = NO_NETWORKS,
) -> tuple[dict[str, float], str | None]:
    """Compute the scores of `FRAME_SCORES` that are among the groups.

    Args:
        frames_THWC: uint8 [T, H, W, 3].
        groups: Names of groups; those that need tracks are left out.
        prompt: Names the kind of figure, for `figures`.
        fps: Frames per second.
        networks: Those of `vbench`; scores whose network is not there are left out.

    Returns:
        Values by name, NaN where the video does not allow one, and why some are missing.
    """
    found: dict[str, float] = {}
    problems: list[str | None] = []
    if "figures" in groups:
        try:
            found |= figure_scores(frames_THWC, kind_in_prompt(prompt), fps=fps)
        except NoFigureError as error:
            problems.append(str(error))
    if "vbench" in groups:
        values, problem = vbench_scores(frames_THWC, fps=fps, networks=networks)
        found |= values
        problems.append(problem)
    if "appearance" in groups:
        found |= appearance_scores(frames_THWC)
    return found, "; ".join(filter(None, problems)) or None
