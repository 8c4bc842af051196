"""The groups of scores, and the scores that need nothing but a video's frames."""

from collections.abc import Collection, Mapping

import numpy as np

from stages.config import FrameScoreGroup, ScoreGroup
from stages.video_scores.appearance import APPEARANCE, appearance_scores
from stages.video_scores.divergence import DIVERGENCE
from stages.video_scores.figures import FIGURES, NoFigureError, figure_scores, kind_in_prompt
from stages.video_scores.score import Score
from stages.video_scores.structure import STRUCTURE
from stages.video_scores.vbench import VBENCH, vbench_scores

SCORES: Mapping[ScoreGroup, tuple[Score, ...]] = {
    "structure": STRUCTURE + DIVERGENCE,
    "figures": FIGURES,
    "vbench": VBENCH,
    "appearance": APPEARANCE,
}
"""The scores of each group, in the order of the tables; those of `DIVERGENCE` need a reference."""

FRAME_SCORES: tuple[FrameScoreGroup, ...] = ("figures", "vbench", "appearance")
"""Groups that are computed from a video's frames."""


def frame_scores(
    frames_THWC: np.ndarray, groups: Collection[str], *, prompt: str | None, fps: float
) -> tuple[dict[str, float], str | None]:
    """Compute the scores of `FRAME_SCORES` that are among the groups.

    Args:
        frames_THWC: uint8 [T, H, W, 3].
        groups: Names of groups; those that need tracks are left out.
        prompt: Names the kind of figure, for `figures`.
        fps: Frames per second.

    Returns:
        Values by name, NaN where the video does not allow one, and why some are missing.
    """
    found: dict[str, float] = {}
    problem = None
    if "figures" in groups:
        try:
            found |= figure_scores(frames_THWC, kind_in_prompt(prompt), fps=fps)
        except NoFigureError as error:
            problem = str(error)
    if "vbench" in groups:
        found |= vbench_scores(frames_THWC)
    if "appearance" in groups:
        found |= appearance_scores(frames_THWC)
    return found, problem
