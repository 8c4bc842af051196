"""Differences between arms, in pairs of the same clip and training seed, with intervals."""

# Legend: S training seed, V video (test clip), K score, R draw of the bootstrap.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.evaluate.compare import MIN_PROMPTS

STRUCTURE_SCORES = ("limb_presence", "limb_length_error", "joint_gap", "extra_pieces")
"""Scores of the structure error; presence counts as 1 - presence."""
_RESAMPLES = 4000
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value and its 95% interval, NaN with fewer than `MIN_PROMPTS` clips."""

    value: float
    low: float
    high: float

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def text(self) -> str:
        """The value with its interval, bold if it is decided."""
        if np.isnan(self.value):
            return "no value"
        if np.isnan(self.low):
            return f"{self.value:+.3f}"
        text = f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"**{text}**" if self.is_decided else text


def values_SV(rows: Sequence[Row], score: str) -> np.ndarray:
    """The values of a score: float64 [S, V], NaN where a video has none.

    Raises:
        ValueError: The rows are of different clips.
    """
    keys = sorted(rows[0]["videos"])
    for row in rows:
        if sorted(row["videos"]) != keys:
            raise ValueError(f"{row['name']} and {rows[0]['name']} are of different clips")
    return np.array(
        [
            [np.nan if (value := row["videos"][key].get(score)) is None else value for key in keys]
            for row in rows
        ],
        dtype=float,
    )


def errors_SV(rows: Sequence[Row], score: str) -> np.ndarray:
    """`values_SV` of a structure score, turned so that lower is better."""
    values = values_SV(rows, score)
    return 1 - values if score == "limb_presence" else values


def structure_errors(rows: Sequence[Row], base: Row) -> float:
    """Mean over `STRUCTURE_SCORES` of the mean error relative to the base model's; 1 for it."""
    errors_KSV = np.stack([errors_SV(rows, score) for score in STRUCTURE_SCORES])
    return float(_relative_errors(errors_KSV, base, np.ones((1, *errors_KSV.shape[1:])))[0])


def difference(rows: Sequence[Row], others: Sequence[Row], score: str) -> Estimate:
    """Mean of a score minus the others' over the pairs in which both have a value.

    Args:
        rows: Of one arm, one per training seed.
        others: Of the other arm, of the same seeds.
        score: Its name.
    """
    pairs_SV = values_SV(rows, score) - values_SV(others, score)
    return _estimate(lambda weights_RSV: _means(pairs_SV, weights_RSV), pairs_SV.shape)


def structure_change(rows: Sequence[Row], others: Sequence[Row], base: Row) -> Estimate:
    """Structure error relative to the others', minus 1: -0.5 is half of it."""
    ours_KSV, theirs_KSV = (
        np.stack([errors_SV(one, score) for score in STRUCTURE_SCORES]) for one in (rows, others)
    )
    # Videos without a value in one arm are left out of both.
    missing_KSV = np.isnan(ours_KSV) | np.isnan(theirs_KSV)
    ours_KSV[missing_KSV] = theirs_KSV[missing_KSV] = np.nan

    def change(weights_RSV: np.ndarray) -> np.ndarray:
        ours, theirs = (
            _relative_errors(errors_KSV, base, weights_RSV) for errors_KSV in (ours_KSV, theirs_KSV)
        )
        return ours / theirs - 1

    return _estimate(change, ours_KSV.shape[1:])


def _relative_errors(errors_KSV: np.ndarray, base: Row, weights_RSV: np.ndarray) -> np.ndarray:
    relative = [
        _means(error_SV, weights_RSV) / _everything(errors_SV([base], score))
        for error_SV, score in zip(errors_KSV, STRUCTURE_SCORES, strict=True)
    ]
    return np.mean(relative, axis=0)


def _estimate(statistic: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Estimate:
    """Percentile interval over training seeds and videos, both drawn with replacement.

    Args:
        statistic: Values [R] of draws, given how often each pair is drawn: [R, S, V].
        shape: S and V.
    """
    random = np.random.default_rng(0)
    counts = [random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) for n in shape]
    drawn_R = statistic(counts[0][:, :, None] * counts[1][:, None, :])
    (everything,) = statistic(np.ones((1, *shape)))
    if np.isnan(everything) or shape[1] < MIN_PROMPTS:
        return Estimate(value=float(everything), low=np.nan, high=np.nan)
    low, high = np.nanpercentile(drawn_R, [2.5, 97.5])
    return Estimate(value=float(everything), low=float(low), high=float(high))


def _means(values_SV: np.ndarray, weights_RSV: np.ndarray) -> np.ndarray:
    """Weighted means [R] of the values that are there; NaN if none is."""
    there_SV = ~np.isnan(values_SV)
    weights_R = (weights_RSV * there_SV).sum((1, 2))
    sums_R = (weights_RSV * np.where(there_SV, values_SV, 0)).sum((1, 2))
    return np.divide(sums_R, weights_R, out=np.full(len(sums_R), np.nan), where=weights_R > 0)


def _everything(values_SV: np.ndarray) -> np.ndarray:
    """Mean [1] of the values that are there."""
    return _means(values_SV, np.ones((1, *values_SV.shape)))
