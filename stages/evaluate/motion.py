"""How much two sets of videos differ in their motion, by statistics of their Gram flows.

Needs no network besides SAM2's tracks. Compared with real videos of the same kind, it says whether
generated subjects move as real ones do, whatever they look like.
"""

import math

import numpy as np

from stages.evaluate.distances import MIN_VIDEOS_MMD, kernel_mmd
from stages.evaluate.structure import SubjectTracks, pair_flows

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def motion_features(tracks: SubjectTracks, *, temperature: float) -> np.ndarray:
    """Describe a video's motion: float64 [12], NaN if no pair of frames shows the subject.

    Quantiles of the speed of the subject's tokens relative to the camera and of the entropy of
    their Gram flow, the camera's speed, and the change of the subject's mean velocity from pair to
    pair. Speeds are in frame heights per second, accelerations per pair.

    Args:
        tracks: Tracks of the video's subject.
        temperature: Temperature of the softmax over neighbours.
    """
    pairs = pair_flows(tracks, temperature=temperature)
    if not pairs:
        return np.full(2 * len(_QUANTILES) + 2, math.nan)
    speeds_N = np.concatenate([np.hypot(*one.own_N2.T) for one in pairs])
    entropies_N = np.concatenate([one.entropy_N for one in pairs])
    velocities_P2 = np.stack([one.own_N2.mean(axis=0) for one in pairs])
    changes_P = np.hypot(*np.diff(velocities_P2, axis=0).T) if len(pairs) > 1 else np.zeros(1)
    camera_P = [np.hypot(*one.camera_2) for one in pairs]
    return np.array(
        [
            *np.quantile(speeds_N, _QUANTILES),
            *np.quantile(entropies_N, _QUANTILES),
            np.mean(camera_P),
            changes_P.mean(),
        ]
    )


def motion_distance(
    first_ND: np.ndarray, second_MD: np.ndarray, *, seed: int
) -> tuple[float, float] | str:
    """The squared MMD between the motion of two sets of videos, and its standard error.

    Features are divided by their standard deviation over both sets. 0 for equal motion; values can
    be compared only between sets of videos of one size, length and rate.

    Returns:
        Or, as a string, why there is none: too few videos with a track.
    """
    first_ND, second_MD = (
        features[np.isfinite(features).all(axis=1)] for features in (first_ND, second_MD)
    )
    fewest = min(len(first_ND), len(second_MD))
    if fewest < MIN_VIDEOS_MMD:
        return f"{fewest} videos of a side have a track; a distance needs {MIN_VIDEOS_MMD}"
    both = np.concatenate([first_ND, second_MD])
    spread_D = both.std(axis=0)
    scale_D = np.where(spread_D > 0, spread_D, 1.0)
    found = kernel_mmd(
        (first_ND - both.mean(axis=0)) / scale_D,
        (second_MD - both.mean(axis=0)) / scale_D,
        seed=seed,
    )
    return found.squared, found.standard_error
