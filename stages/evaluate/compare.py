"""Means with 95% intervals, and differences of paired videos.

Intervals are bootstrapped over prompts: BCa with 9,999 resamples (Efron 1987, "Better bootstrap
confidence intervals"; `scipy.stats.bootstrap`), seeded, and independent of the videos' order. They
describe how the mean would vary with other prompts of the same kind. Several seeds of a prompt are
not independent, so they are averaged first: every prompt weighs the same.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap

LEVEL = 0.95
"""Confidence level of intervals."""

MIN_PROMPTS = 5
"""Fewest prompts for which an interval is given."""

RESAMPLES = 9_999

_BATCH_VALUES = 1 << 22
"""Values resampled at a time: 32 MB of float64, and as much for their indices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean of a score, in the score's unit, with its interval."""

    mean: float
    """NaN if no video has a value."""
    low: float | None
    high: float | None
    """95% interval; None with fewer than `MIN_PROMPTS` prompts."""
    method: Literal["BCa", "percentile"] | None
    """How the interval was computed."""
    note: str
    """Why there is no interval, or why it is not BCa; empty otherwise."""
    count: int
    """Values that were averaged."""
    prompts: int
    """Prompts among them, over which the mean and the interval are taken."""
    missing: int
    """Values that were NaN, and are not part of the mean."""

    @property
    def text(self) -> str:
        """Such as `0.52 [0.48, 0.55], n=20 of 10 prompts, 2 missing`."""
        of = "" if self.prompts == self.count else f" of {self.prompts} prompts"
        parts = [f"n={self.count}{of}", *([f"{self.missing} missing"] if self.missing else [])]
        if self.count == 0:
            return ", ".join(["no value", *parts])
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return ", ".join([f"{self.mean:.4g}{interval}", *parts])

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a mean of no values is None."""
        return asdict(self) | {"mean": None if math.isnan(self.mean) else self.mean}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A score on pairs of videos: first side against second side."""

    difference: Mean
    """First minus second, averaged over pairs; pairs with a NaN are its `missing`. The interval is
    of the mean of the differences, and so narrower than the sides' own where pairs vary alike."""
    win_rate: float | None
    """Fraction of pairs in which the first side is better, ties counted half; None without pairs,
    or if neither direction of the score is better."""
    ties: int
    """Pairs with equal values."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "difference": self.difference.as_dict(),
            "win_rate": self.win_rate,
            "ties": self.ties,
        }


def mean_of(values: ArrayLike, *, seed: int, prompts: Sequence[Hashable] | None = None) -> Mean:
    """Mean and interval of one score over a side's prompts.

    Args:
        values: one number per video; NaN where the video does not allow the score.
        seed: seed of the resampling; equal seeds and values give equal intervals.
        prompts: the prompt of each video; None means that all differ.

    Raises:
        ValueError: values are not one-dimensional, infinite, or not as many as prompts.
    """
    values_N = _checked(values)
    known_N = values_N[~np.isnan(values_N)]
    count, missing = len(known_N), len(values_N) - len(known_N)
    means_P = np.sort(known_N) if prompts is None else _means_of_prompts(values_N, prompts)
    numbers = {"count": count, "prompts": len(means_P), "missing": missing}
    # Sorted, so that neither rounding nor the resampling depends on the order of videos.
    mean = math.fsum(means_P) / len(means_P) if count else math.nan
    if len(means_P) < MIN_PROMPTS:
        noun = "value" if prompts is None else "prompt"
        noun += "" if len(means_P) == 1 else "s"
        note = f"{len(means_P)} {noun}; an interval needs {MIN_PROMPTS}"
        return Mean(mean=mean, low=None, high=None, method=None, note=note, **numbers)
    method: Literal["BCa", "percentile"] = "BCa"
    note = ""
    if means_P[0] == means_P[-1]:
        method, note = "percentile", "all values are equal"
        low = high = mean
    else:
        low, high = _bootstrapped(means_P, "BCa", seed)
        if not math.isfinite(low + high):
            method, note = "percentile", "BCa is undefined for these values"
            low, high = _bootstrapped(means_P, "percentile", seed)
    return Mean(mean=mean, low=low, high=high, method=method, note=note, **numbers)


def _means_of_prompts(values_N: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """float64 [prompts], ascending: the mean of each prompt's known values."""
    known: dict[Hashable, list[float]] = defaultdict(list)
    for value, prompt in zip(values_N, prompts, strict=True):
        if not math.isnan(value):
            known[prompt].append(value)
    return np.sort([math.fsum(one) / len(one) for one in known.values()])


def compare_pairs(
    first: ArrayLike,
    second: ArrayLike,
    *,
    better: Literal["higher", "lower"] | None,
    seed: int,
    prompts: Sequence[Hashable] | None = None,
) -> Comparison:
    """Compare one score on pairs of videos.

    Args:
        first: values of the first side, one per pair; NaN where a video does not allow the score.
        second: values of the second side, of the same pairs in the same order.
        better: which values are better; None gives no win rate.
        seed: as for `mean_of`.
        prompts: the prompt of each pair; None means that all differ.

    Raises:
        ValueError: the sides differ in length, or values are infinite.
    """
    first_N, second_N = _checked(first), _checked(second)
    if first_N.shape != second_N.shape:
        raise ValueError(
            f"pairs need as many values on both sides, got {len(first_N)} and {len(second_N)}"
        )
    # Resampling pairs is resampling their differences.
    difference_N = first_N - second_N
    known_N = difference_N[~np.isnan(difference_N)]
    ties = int((known_N == 0).sum())
    win_rate = None
    if better is not None and len(known_N):
        wins = int((known_N > 0).sum() if better == "higher" else (known_N < 0).sum())
        win_rate = (wins + ties / 2) / len(known_N)
    difference = mean_of(difference_N, seed=seed, prompts=prompts)
    return Comparison(difference=difference, win_rate=win_rate, ties=ties)


def _checked(values: ArrayLike) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1:
        raise ValueError(f"values must be one per video, got shape {values_N.shape}")
    if infinite := int(np.isinf(values_N).sum()):
        raise ValueError(
            f"{infinite} of {len(values_N)} values are infinite and have no mean; a score must be "
            "NaN where it cannot be measured"
        )
    return values_N


def _bootstrapped(values_N: np.ndarray, method: str, seed: int) -> tuple[float, float]:
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        interval = bootstrap(
            (values_N,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, _BATCH_VALUES // len(values_N)),
            confidence_level=LEVEL,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)
