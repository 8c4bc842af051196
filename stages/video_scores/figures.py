"""Faults of the demo's figures in a video without ground truth, from the colours of their limbs.

The body plans (`stages.demo.figures`) give each limb a colour, a length and a radius, so that a
generated figure can be checked for missing, stretched, detached, duplicated and swapped limbs.
What other limbs or the post may hide is left out of the means, not counted as a fault.
"""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from stages.demo.figures import BODY_PLANS, BodyPlan, Kind
from stages.video_scores.limb_labels import BACKGROUND, label_limbs
from stages.video_scores.limb_regions import FigureRegions
from stages.video_scores.score import Score

# Legend: T frame, H W pixels, C colour (RGB), 2 x and y.

_MAX_HIDDEN_S = 0.75
"""Longest time for which a limb may be hidden, seconds."""
_MAX_SHIFT = 0.2
"""How far a limb may move meanwhile relative to the figure, in figure sizes."""
_MIN_COVERED = 0.6
"""Fraction of a limb's last visible part that something must cover to hide the limb."""
_MAX_TOUCHING = 0.1
"""Largest gap between the limbs around a hidden one, in figure sizes."""
_EDGE_PIXELS = 3.0
"""Distance of pixels of touching limbs: compression blurs the edge between two colours."""
_SWAP_COST = 0.15
"""Acceleration per frame, in figure sizes, that a swap must explain."""
_MAX_BRIDGED = 3
"""Longest step between two frames over which positions are interpolated, frames."""


FIGURES = (
    Score(
        name="limb_presence",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="fraction of the plan's limbs that are there or may be hidden",
    ),
    Score(
        name="limb_length_error",
        unit="1",
        lowest=0.0,
        highest=math.inf,
        better="lower",
        description="length of a limb against the plan's, relative; the figure's size is the "
        "median over its limbs",
    ),
    Score(
        name="joint_gap",
        unit="figure sizes",
        lowest=0.0,
        highest=math.inf,
        better="lower",
        description="background between limbs that share a joint",
    ),
    Score(
        name="extra_pieces",
        unit="1/limb",
        lowest=0.0,
        highest=math.inf,
        better="lower",
        description="pieces of a limb's colour beyond the first that nothing in front explains",
    ),
    Score(
        name="side_swaps",
        unit="1/s",
        lowest=0.0,
        highest=math.inf,
        better="lower",
        description="exchanges of a left and a right limb while the smooth motion continues in the "
        "other colour, per pair of limbs",
    ),
    Score(
        name="motion_amplitude",
        unit="radians",
        lowest=0.0,
        highest=math.pi,
        better=None,
        description="range of a limb's angle over the video; 0 for a still one, 0.7 to 1.9 for the "
        "demo's own clips",
    ),
)
"""Means over frames and limbs, pairs or joints, where they can be measured."""


_WORD_OF_KIND: dict[Kind, str] = {"biped": "biped", "quadruped": "quadruped", "arm": "robot"}
"""A word of the demo's prompts that names the kind."""


class NoFigureError(ValueError):
    """A video's prompt names none of the demo's figures."""


def kind_in_prompt(prompt: str | None) -> Kind:
    """Return the kind of figure that a prompt asks for.

    Raises:
        NoFigureError: It names none, or the video has no prompt.
    """
    if prompt is None:
        raise NoFigureError("no prompt; scores of figures need to know the kind of figure")
    words = re.findall(r"[a-z]+", prompt.lower())
    for kind in BODY_PLANS:
        if _WORD_OF_KIND[kind] in words:
            return kind
    raise NoFigureError(f"the prompt names no biped, quadruped or robot arm: {prompt:.80}")


def figure_scores(frames_THWC: np.ndarray, kind: Kind, *, fps: float) -> dict[str, float]:
    """Compute the scores of `FIGURES` for a video of one figure of the demo.

    Args:
        frames_THWC: uint8 [T, H, W, 3]; accurate from about 60 pixels per figure.
        kind: Kind of figure in the prompt.
        fps: Frames per second.

    Returns:
        Scores by name; NaN where nothing can be measured.

    Raises:
        ValueError: Invalid shape or dtype of the frames, or rate.
    """
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3], got {frames_THWC.dtype} {frames_THWC.shape}"
        )
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    plan = BODY_PLANS[kind]
    figure = FigureRegions(label_limbs(frames_THWC, plan), plan)
    return {
        "limb_presence": _mean(_presences(figure, fps)),
        "limb_length_error": _mean(_length_errors(figure)),
        "joint_gap": _mean(_joint_gaps(figure)),
        "extra_pieces": _mean(list(figure.extra_pieces.values())),
        "side_swaps": fps * _swaps_per_frame(figure),
        "motion_amplitude": _mean(_amplitudes(figure)),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _presences(figure: FigureRegions, fps: float) -> list[float]:
    keys = np.ndindex(figure.num_frames, len(figure.plan.limbs))
    seen = [(key in figure.regions, *key) for key in keys]
    return [
        float(is_seen)
        for is_seen, frame, index in seen
        if is_seen or not _is_hidden(figure, index, frame, fps)
    ]


def _is_hidden(figure: FigureRegions, index: int, frame: int, fps: float) -> bool:
    """Whether something in front may hide an unseen limb.

    Either it covers the place where the limb was last seen, or the limb hangs from it and so does,
    as it seems, what hangs from the limb: an upper arm may be behind the torso if the forearm
    touches the torso or is hidden too.
    """
    if _is_hidden_where_last_seen(figure, index, frame, fps):
        return True
    limbs, regions = figure.plan.limbs, figure.regions
    covers = [
        regions[frame, cover]
        for cover, limb in enumerate(limbs)
        if limbs[index].start in (limb.start, limb.end)
        and figure.rank_L[cover] > figure.rank_L[index]
        and (frame, cover) in regions
    ]
    for child, limb in enumerate(limbs):
        if limb.start != limbs[index].end or not covers:
            continue
        if (frame, child) not in regions:
            return _is_hidden(figure, child, frame, fps)
        pixels_N2 = regions[frame, child].pixels_N2
        gaps = [figure.gap(frame, pixels_N2, cover.pixels_N2)[0] for cover in covers]
        if min(gaps) < _MAX_TOUCHING * figure.size:
            return True
    return False


def _is_hidden_where_last_seen(figure: FigureRegions, index: int, frame: int, fps: float) -> bool:
    """Whether something in front covers a place near the one where a limb was last or next seen."""
    seen = figure.track(index)
    nearest = min(seen, key=lambda other: abs(other - frame), default=None)
    if nearest is None or abs(nearest - frame) > _MAX_HIDDEN_S * fps:
        return False
    moved_2 = _figure_centre(figure, frame) - _figure_centre(figure, nearest)
    pixels_N2 = seen[nearest].pixels_N2 + moved_2
    for x in np.linspace(-1, 1, 5) * _MAX_SHIFT * figure.size:
        for y in np.linspace(-0.5, 0.5, 3) * _MAX_SHIFT * figure.size:
            labels_N = figure.labels_at(frame, pixels_N2 + np.array([x, y]))
            if figure.hides(labels_N, index).mean() > _MIN_COVERED:
                return True
    return False


def _figure_centre(figure: FigureRegions, frame: int) -> np.ndarray:
    y, x = np.nonzero(figure.labels_THW[frame] >= 0)
    return np.array([x.mean(), y.mean()]) if len(x) else np.zeros(2)


def _length_errors(figure: FigureRegions) -> list[float]:
    errors = []
    for (_, index), length in figure.lengths.items():
        error = (length.extent / figure.size - length.caps) / figure.plan.limbs[index].length - 1
        if not length.is_minimum or error > 0:
            errors.append(abs(error))
    return errors


def _joint_gaps(figure: FigureRegions) -> list[float]:
    gaps = []
    for parent, child in _attached_limbs(figure.plan):
        for frame in range(figure.num_frames):
            one, other = (figure.regions.get((frame, index)) for index in (parent, child))
            if one is None or other is None:
                continue
            distance, between_N = figure.gap(frame, one.pixels_N2, other.pixels_N2)
            if distance < _EDGE_PIXELS:
                gaps.append(0.0)
            elif (between_N == BACKGROUND).all():
                gaps.append((distance - 1) / figure.size)
    return gaps


def _attached_limbs(plan: BodyPlan) -> Iterator[tuple[int, int]]:
    """Pairs of limbs of which the second hangs from the first, by index."""
    for parent, limb in enumerate(plan.limbs):
        for child, other in enumerate(plan.limbs):
            hangs = other.start == limb.end
            if limb.name == "torso" and other != limb:
                # Limbs hang from both of its ends; a biped's head has a joint of its own above.
                hangs |= other.start == limb.start or (plan.kind, other.name) == ("biped", "head")
            if hangs:
                yield parent, child


def _swaps_per_frame(figure: FigureRegions) -> float:
    """Swaps per step between two frames, over all pairs of a left and a right limb."""
    names = [limb.name for limb in figure.plan.limbs]
    swaps, steps = 0, 0
    for index, name in enumerate(names):
        if not name.startswith("left_"):
            continue
        left = figure.track(index)
        right = figure.track(names.index(name.replace("left_", "right_", 1)))
        both = np.array(sorted(left.keys() & right.keys()), dtype=int)
        for run in np.split(both, np.flatnonzero(np.diff(both) > _MAX_BRIDGED) + 1):
            if len(run) < 3:
                continue
            known_T4 = np.array([[*left[t].centre_2, *right[t].centre_2] for t in run])
            frames = np.arange(run[0], run[-1] + 1)
            paths_4T = [np.interp(frames, run, known_T) for known_T in known_T4.T]
            swaps += count_swaps(np.stack(paths_4T, axis=1).reshape(-1, 2, 2) / figure.size)
            steps += len(frames) - 1
    return swaps / steps if steps else float("nan")


def count_swaps(pairs_T22: np.ndarray) -> int:
    """Fewest exchanges of two points that make both paths smooth.

    Minimises the sum of accelerations plus a cost per exchange over all assignments of points to
    paths (Viterbi; a state is the assignment in two successive frames).

    Args:
        pairs_T22: Two points in each of at least two frames, in figure sizes.
    """
    states = [(before, now) for before in (0, 1) for now in (0, 1)]
    best: dict[tuple[int, int], tuple[float, int]] = {
        (before, now): (_SWAP_COST * (before != now), int(before != now)) for before, now in states
    }
    for t in range(2, len(pairs_T22)):
        following = {}
        for before, now in states:
            options = []
            for earlier in (0, 1):
                flips = ((t - 2, earlier), (t - 1, before), (t, now))
                path_322 = np.stack(
                    [pairs_T22[s, ::-1] if flip else pairs_T22[s] for s, flip in flips]
                )
                bend = float(np.linalg.norm(np.diff(path_322, n=2, axis=0)[0], axis=-1).sum())
                cost, swaps = best[earlier, before]
                options.append(
                    (cost + bend + _SWAP_COST * (before != now), swaps + (before != now))
                )
            following[before, now] = min(options)
        best = following
    return min(best.values())[1]


def _amplitudes(figure: FigureRegions) -> list[float]:
    """Smallest arc that holds all angles of each limb's axis, radians."""
    amplitudes = []
    for index in range(len(figure.plan.limbs)):
        axes = [figure.regions[key].axis_2 for key in figure.lengths if key[1] == index]
        if len(axes) >= 2:
            angles = np.sort([np.arctan2(y, x) % np.pi for x, y in axes])
            gaps = np.diff([*angles, angles[0] + np.pi])
            amplitudes.append(max(float(np.pi - gaps.max()), 0.0))
    return amplitudes
