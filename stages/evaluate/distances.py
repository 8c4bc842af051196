"""Distances between the feature vectors of two sets of videos.

Legend: N M videos of the first and second set, D feature dimensions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MIN_VIDEOS_MMD = 10
"""Fewest videos per set for an MMD: two subsets of five give its standard error."""

_MAX_SUBSETS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """A distance between two sets of videos, or why there is none."""

    value: float | None
    """None if it cannot be computed, such as with too few videos."""
    standard_error: float | None
    note: str = ""
    """Why there is no value; empty otherwise."""

    @property
    def text(self) -> str:
        """Such as `0.52, standard error 0.03`."""
        if self.value is None:
            return f"none: {self.note}"
        return f"{self.value:.4g}, standard error {self.standard_error:.2g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MMD:
    """An unbiased estimate of a squared maximum mean discrepancy."""

    squared: float
    """Below 0 by chance where the distributions are equal or nearly so."""
    standard_error: float
    """From the spread over disjoint subsets; that of their mean, so rather too large."""
    subsets: int


def kernel_mmd(first: ArrayLike, second: ArrayLike, *, seed: int) -> MMD:
    """Squared MMD between two sets of features, with the kernel (x y / D + 1)^3 of KID.

    The estimate uses all pairs of videos but those of a video with itself, in float64, and is
    unbiased for any number of videos. Memory is that of an N x M matrix.

    Args:
        first: features_ND.
        second: features_MD.
        seed: seed of the division into subsets, which changes the standard error only.

    Raises:
        ValueError: shapes do not fit, features are NaN or infinite, or a set has fewer than
            `MIN_VIDEOS_MMD` videos.

    Source: Binkowski et al., arXiv 1801.01401 (KID); Gretton et al., JMLR 13 (2012), equation 3.
    """
    first_ND, second_MD = _checked(first, second, fewest=MIN_VIDEOS_MMD)
    fewest = min(len(first_ND), len(second_MD))
    subsets = min(_MAX_SUBSETS, fewest // (MIN_VIDEOS_MMD // 2))
    rng = np.random.default_rng(seed)
    parts_N = np.array_split(rng.permutation(len(first_ND)), subsets)
    parts_M = np.array_split(rng.permutation(len(second_MD)), subsets)
    estimates = [
        _mmd_squared(first_ND[part_N], second_MD[part_M])
        for part_N, part_M in zip(parts_N, parts_M, strict=True)
    ]
    return MMD(
        squared=_mmd_squared(first_ND, second_MD),
        standard_error=float(np.std(estimates, ddof=1) / np.sqrt(subsets)),
        subsets=subsets,
    )


def _mmd_squared(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    within = _mean_off_diagonal(first_ND) + _mean_off_diagonal(second_MD)
    return float(within - 2 * _kernel(first_ND, second_MD).mean())


def _mean_off_diagonal(features_ND: np.ndarray) -> float:
    kernel_NN = _kernel(features_ND, features_ND)
    np.fill_diagonal(kernel_NN, 0.0)
    count = len(features_ND)
    return float(kernel_NN.sum() / (count * (count - 1)))


def _kernel(first_ND: np.ndarray, second_MD: np.ndarray) -> np.ndarray:
    kernel_NM: np.ndarray = (first_ND @ second_MD.T / first_ND.shape[1] + 1.0) ** 3
    return kernel_NM


def _checked(first: ArrayLike, second: ArrayLike, *, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    sets = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    shapes = [features.shape for features in sets]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or not shapes[0][1]:
        raise ValueError(
            f"features must be [videos, dimensions] of equal dimensions, got {shapes[0]} and "
            f"{shapes[1]}"
        )
    for name, features in zip(("first", "second"), sets, strict=True):
        if len(features) < fewest:
            raise ValueError(f"the {name} set has {len(features)} videos, at least {fewest} needed")
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{len(bad)} videos of the {name} set have NaN or infinite features, such as "
                f"number {bad[0]}; leave them out, and report them"
            )
    return sets
