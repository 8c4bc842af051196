"""Finds and measures the limbs of the demo's figures in labelled frames."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stages.demo.figures import BodyPlan
from stages.video_scores.limb_labels import BACKGROUND, OUTSIDE, connected_pieces

# Legend: T frame, H W pixels, L limb, N pixel or point, 2 x and y.

_MIN_VISIBLE = 0.15
"""Smallest visible part of a limb, as a fraction of its area."""
_MIN_MAIN_PIECE, _MIN_PIECE = 0.1, 0.05
"""Smallest largest piece and other piece of that part, as fractions of the limb's area."""
_MIN_SHARE, _MAX_AREA = 1 / 3, 4.0
"""Smallest share of a colour's pixels in the limb, and largest limb as a multiple of its area, so
that colourful noise and large areas are not limbs."""
_SIZES = (0.3, 1.5)
"""Smallest and largest size of a figure, in frame heights."""
_MIN_EXTRA, _MIN_EXTRA_PIXELS = 0.25, 6
"""Smallest piece that counts as one too many, as a fraction of the limb's area and in pixels."""
_MIN_SLENDERNESS = 3.0
"""Ratio of length to radius from which a limb's length and angle can be measured."""
_STEP = 0.25
"""Distance of samples along a limb's axis, pixels."""

Key = tuple[int, int]
"""Frame and index of the limb in the body plan."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Pixels of one limb in one frame and their principal axis."""

    pixels_N2: np.ndarray
    """Pixel centres."""
    centre_2: np.ndarray
    axis_2: np.ndarray
    """Unit vector."""
    low: float
    """Positions of the two ends along the axis from the centre, pixels."""
    high: float
    width: float
    """Extent across the axis, pixels."""

    @property
    def extent(self) -> float:
        """Extent along the axis, pixels."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Length:
    """Extent of a limb's visible part."""

    extent: float
    """Pixels."""
    caps: float
    """How far it reaches beyond the limb's joints, in figure sizes; negative where they are hidden.
    """
    is_minimum: bool
    """Whether more of the limb may be hidden."""


def _region(pixels_N2: np.ndarray) -> Region:
    centre_2 = pixels_N2.mean(axis=0)
    offset_N2 = pixels_N2 - centre_2
    _, axes_22 = np.linalg.eigh(offset_N2.T @ offset_N2)
    across_N, along_N = (offset_N2 @ axes_22).T
    low, high = float(along_N.min()) - 0.5, float(along_N.max()) + 0.5  # a pixel is one wide
    return Region(pixels_N2, centre_2, axes_22[:, 1], low, high, float(np.ptp(across_N)) + 1)


class FigureRegions:
    """The limbs of the figure in a labelled video.

    Args:
        labels_THW: From `label_limbs`.
        plan: Body plan of the figure.
    """

    def __init__(self, labels_THW: np.ndarray, plan: BodyPlan) -> None:
        self.labels_THW, self.plan = labels_THW, plan
        self.num_frames = len(labels_THW)
        self.regions: dict[Key, Region] = {}
        """Visible limbs."""
        self.extra_pieces: dict[Key, int] = {}
        """Pieces of a visible limb's colour beyond the first that nothing in front explains."""
        self.lengths: dict[Key, Length] = {}
        """Lengths of the visible limbs that can be measured."""
        self.rank_L = np.arange(len(plan.limbs))
        """Position in the drawing order, back to front."""
        self.size = float("nan")
        """Pixels per unit of the body plan, NaN without any limb."""
        pieces = _pieces(labels_THW)
        if not pieces:
            return
        # The upper quartile, since parts are hidden.
        extents = {key: _region(parts[0]).extent for key, parts in pieces.items()}
        self.size = self._size(
            ((key, extent, 2 * plan.limbs[key[1]].radius) for key, extent in extents.items()), 75
        )
        for _ in range(2):  # with the first size, then with the measured one
            self._find_regions(pieces)
            self._rank_limbs()
            self._measure_lengths()

    def _size(self, lengths: Iterable[tuple[Key, float, float]], percentile: float) -> float:
        """Percentile over limbs of that over frames, of sizes from extents and caps."""
        sizes: dict[int, list[float]] = {}
        for (_, index), extent, caps in lengths:
            sizes.setdefault(index, []).append(extent / (self.plan.limbs[index].length + caps))
        by_limb = [np.percentile(values, percentile) for values in sizes.values()]
        size = float(np.percentile(by_limb, percentile))
        return float(np.clip(size, *(limit * self.labels_THW.shape[1] for limit in _SIZES)))

    def _find_regions(self, pieces: dict[Key, list[np.ndarray]]) -> None:
        self.regions, self.extra_pieces = {}, {}
        for key, candidates in pieces.items():
            limb = self.plan.limbs[key[1]]
            area = (2 * limb.length + np.pi * limb.radius) * limb.radius * self.size**2
            parts = [part_N2 for part_N2 in candidates if len(part_N2) >= _MIN_PIECE * area]
            is_visible = sum(map(len, parts)) >= _MIN_VISIBLE * area
            if not is_visible or len(parts[0]) < _MIN_MAIN_PIECE * area:
                continue
            region, others = self._join(key, parts)
            share = len(region.pixels_N2) / sum(map(len, candidates))
            if share >= _MIN_SHARE and len(region.pixels_N2) <= _MAX_AREA * area:
                smallest_extra = max(_MIN_EXTRA * area, _MIN_EXTRA_PIXELS)
                self.regions[key] = region
                self.extra_pieces[key] = sum(len(part) >= smallest_extra for part in others)

    def _join(self, key: Key, parts: list[np.ndarray]) -> tuple[Region, list[np.ndarray]]:
        """Join to the first piece those that fit one limb with it, with something in front between.

        Returns the other pieces too.
        """
        frame, index = key
        limb = self.plan.limbs[index]
        longest = 1.3 * (limb.length + 2 * limb.radius) * self.size + 1
        widest = 1.3 * 2 * limb.radius * self.size + 1
        region, others = _region(parts[0]), []
        for part_N2 in parts[1:]:
            both = _region(np.concatenate([region.pixels_N2, part_N2]))
            _, between_N = self.gap(frame, region.pixels_N2, part_N2)
            is_hidden = (between_N == BACKGROUND).mean() < 0.5
            if is_hidden and both.extent <= longest and both.width <= widest:
                region = both
            else:
                others.append(part_N2)
        return region, others

    def _rank_limbs(self) -> None:
        """Find the drawing order: the side that shows more pixels is the near one."""
        names = [limb.name for limb in self.plan.limbs]
        seen = {"left": 0, "right": 0}
        for (_, index), region in self.regions.items():
            side = names[index].partition("_")[0]
            if side in seen:
                seen[side] += len(region.pixels_N2)
        order = self.plan.drawing_order(faces_left=seen["left"] > seen["right"])
        self.rank_L = np.array([[limb.name for limb in order].index(name) for name in names])

    def _measure_lengths(self) -> None:
        measured = {key: self._measure(key, region) for key, region in self.regions.items()}
        self.lengths = {key: length for key, length in measured.items() if length is not None}
        known = [
            (key, length.extent, length.caps)
            for key, length in self.lengths.items()
            if not length.is_minimum
        ]
        if known:
            self.size = self._size(known, 50)

    def _measure(self, key: Key, region: Region) -> Length | None:
        """Measure a limb's visible part, unless it is too short or hidden along a side.

        A free end reaches a radius beyond the joint. A neighbour in front, whose cap is around the
        joint, hides its radius of the limb.
        """
        frame, index = key
        limb = self.plan.limbs[index]
        radius = limb.radius * self.size
        is_slender = limb.length >= _MIN_SLENDERNESS * limb.radius
        is_full = len(region.pixels_N2) >= 0.6 * region.extent * 2 * radius
        if not is_slender or not is_full or region.extent < 1.5 * 2 * radius:
            return None
        across_2 = np.array([-region.axis_2[1], region.axis_2[0]])
        lines_32 = region.centre_2 + np.array([[-0.2], [0], [0.2]]) * radius * across_2
        at_N = np.arange(region.low - 1, region.high + 1, _STEP)
        ends = []
        for line_2 in lines_32:
            own_N = self.labels_at(frame, line_2 + at_N[:, None] * region.axis_2) == index
            edges = np.flatnonzero(np.diff(np.concatenate([[False], own_N, [False]])))
            # A limb's cap can show as a thin rim around the narrower cap of a neighbour in front.
            runs = [run for run in edges.reshape(-1, 2) if np.diff(run) * _STEP >= 0.4 * radius]
            if not runs:
                return None
            ends.append(
                (at_N[0] + _STEP * (runs[0][0] - 0.5), at_N[0] + _STEP * (runs[-1][1] - 0.5))
            )
        low, high = np.median(ends, axis=0)
        caps, hidden_joints, is_minimum = 0.0, [], False
        for sign, end in ((-1, low), (1, high)):
            beyond_N2 = np.concatenate(
                [lines_32 + (end + sign * step) * region.axis_2 for step in (0.5, 1.5, 2.5)]
            )
            labels_N = self.labels_at(frame, beyond_N2)
            covers_N = labels_N[self.hides(labels_N, index)]
            cover = int(np.bincount(covers_N - OUTSIDE).argmax()) + OUTSIDE if len(covers_N) else 0
            if len(covers_N) < 4:
                caps += limb.radius
            elif cover >= 0 and (joint := self._shared_joint(index, cover)):
                hidden_joints.append(joint)
                caps -= self.plan.limbs[cover].radius
            else:
                caps += limb.radius
                is_minimum = True
        is_minimum |= len(hidden_joints) == 2 and hidden_joints[0] == hidden_joints[1]
        return Length(float(high - low), caps, is_minimum)

    def _shared_joint(self, one: int, other: int) -> str | None:
        limbs = self.plan.limbs
        shared = {limbs[one].start, limbs[one].end} & {limbs[other].start, limbs[other].end}
        return next(iter(shared), None)

    def gap(self, frame: int, one_N2: np.ndarray, other_N2: np.ndarray) -> tuple[float, np.ndarray]:
        """Smallest distance of two sets of pixels, and the labels on the line between them."""
        squares_NN = ((one_N2[:, None] - other_N2[None]) ** 2).sum(-1)
        first, second = np.unravel_index(squares_NN.argmin(), squares_NN.shape)
        start_2, end_2 = one_N2[first], other_N2[second]
        distance = float(np.hypot(*(end_2 - start_2)))
        at_N1 = np.linspace(0, 1, int(2 * distance) + 3)[1:-1, None]
        labels_N = self.labels_at(frame, start_2 + at_N1 * (end_2 - start_2))
        own = self.labels_at(frame, np.stack([start_2, end_2]))
        return distance, labels_N[~np.isin(labels_N, own)]

    def labels_at(self, frame: int, points_N2: np.ndarray) -> np.ndarray:
        """Labels of the pixels that contain the points: int64 [N]."""
        height, width = self.labels_THW.shape[1:]
        x_N, y_N = np.floor(points_N2).astype(int).T
        inside_N = (x_N >= 0) & (x_N < width) & (y_N >= 0) & (y_N < height)
        x_N, y_N = np.clip(x_N, 0, width - 1), np.clip(y_N, 0, height - 1)
        return np.where(inside_N, self.labels_THW[frame, y_N, x_N].astype(int), OUTSIDE)

    def hides(self, labels_N: np.ndarray, index: int) -> np.ndarray:
        """Whether each label can hide a limb: the post, the frame's edge, limbs in front: bool."""
        in_front_N = self.rank_L[np.maximum(labels_N, 0)] > self.rank_L[index]
        return np.where(labels_N >= 0, in_front_N, labels_N != BACKGROUND)

    def track(self, index: int) -> dict[int, Region]:
        """Regions of a limb by frame."""
        return {frame: region for (frame, limb), region in self.regions.items() if limb == index}


def _pieces(labels_THW: np.ndarray) -> dict[Key, list[np.ndarray]]:
    """Connected pieces by frame and limb, largest first: pixel centres [N, 2]."""
    numbers_N = connected_pieces(labels_THW).ravel()
    found_N = np.flatnonzero(numbers_N >= 0)
    found_N = found_N[np.argsort(numbers_N[found_N], kind="stable")]
    starts = np.flatnonzero(np.diff(numbers_N[found_N])) + 1
    pieces: dict[Key, list[np.ndarray]] = {}
    for piece_N in np.split(found_N, starts) if len(found_N) else []:
        t_N, y_N, x_N = np.unravel_index(piece_N, labels_THW.shape)
        key = int(t_N[0]), int(labels_THW[t_N[0], y_N[0], x_N[0]])
        pieces.setdefault(key, []).append(np.stack([x_N, y_N], axis=1) + 0.5)
    return {key: sorted(parts, key=len, reverse=True) for key, parts in pieces.items()}
