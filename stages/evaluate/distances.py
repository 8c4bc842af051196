"""Distances between the feature vectors of two sets of videos.

Legend: N M videos of the first and second set, D feature dimensions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MIN_VIDEOS_FRECHET = 256
"""Fewest videos per set for a Frechet distance, unless it is asked for."""

MIN_VIDEOS_MMD = 10
"""Fewest videos per set for an MMD: two subsets of five give its standard error."""

_MAX_SUBSETS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """A distance between two sets of videos, or why there is none."""

    value: float | None
    """None if it cannot be computed, such as with too few videos."""
    standard_error: float | None
    """None if it is not known."""
    note: str = ""
    """Why there is no value, or a warning about it."""

    @property
    def text(self) -> str:
        """Such as `0.52, standard error 0.03`."""
        if self.value is None:
            return f"none: {self.note}"
        error = self.standard_error
        parts = [f"{self.value:.4g}", "" if error is None else f"standard error {error:.2g}"]
        return ", ".join(part for part in (*parts, self.note) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class MMD:
    """An unbiased estimate of a squared maximum mean discrepancy."""

    squared: float
    """Below 0 by chance where the distributions are equal or nearly so."""
    standard_error: float
    """From the spread over disjoint subsets; that of their mean, so rather too large."""
    subsets: int


def frechet_distance(first: ArrayLike, second: ArrayLike, *, allow_few: bool = False) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with unbiased covariances, in float64. With
    S = R^T R, tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T, so that no square root
    of a matrix is needed and fewer videos than dimensions lose no accuracy.

    Args:
        first: features_ND.
        second: features_MD.
        allow_few: compute it for fewer than `MIN_VIDEOS_FRECHET` videos.

    Raises:
        ValueError: shapes do not fit, features are NaN or infinite, or there are too few videos.

    Source: Heusel et al., arXiv 1706.08500 (FID); Unterthiner et al., arXiv 1812.01717 (FVD). Its
    bias in the number of videos: Chong and Forsyth, arXiv 1911.07023.
    """
    first_ND, second_MD = _checked(first, second, fewest=2)
    fewest = min(len(first_ND), len(second_MD))
    if fewest < MIN_VIDEOS_FRECHET and not allow_few:
        raise ValueError(
            f"the Frechet distance needs {MIN_VIDEOS_FRECHET} videos per set, got {fewest}: its "
            "bias grows with small samples, so that fewer videos look worse. Use the MMD, which is "
            "unbiased, or set allow_few=True and compare only sets of the same size"
        )
    shift_D = first_ND.mean(axis=0) - second_MD.mean(axis=0)
    root1, root2 = _covariance_root(first_ND), _covariance_root(second_MD)
    shared = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    squared = shift_D @ shift_D + np.sum(root1**2) + np.sum(root2**2) - 2 * shared
    return max(float(squared), 0.0)


def _covariance_root(features_ND: np.ndarray) -> np.ndarray:
    """R [min(N, D), D] with R^T R the unbiased covariance."""
    centred_ND = features_ND - features_ND.mean(axis=0)
    root: np.ndarray = np.linalg.qr(centred_ND, mode="r") / np.sqrt(len(features_ND) - 1)
    return root


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
