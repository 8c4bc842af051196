"""How much two sets of videos differ in their motion, by statistics of their Gram flows.

Needs no network besides SAM2's tracks. Compared with real videos of the same kind, it says whether
generated subjects move as real ones do, whatever they look like.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stages.evaluate.distances import MIN_VIDEOS_MMD, kernel_mmd
from stages.video_scores.structure import SubjectTracks, pair_flows

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


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionDistance:
    """The squared MMD between the motion of two sets of videos; 0 for equal motion."""

    mmd_squared: float | None
    """None if there are too few videos with a track."""
    standard_error: float | None
    note: str = ""
    """Why there is no distance."""

    @property
    def text(self) -> str:
        """Such as `0.52, standard error 0.03`."""
        if self.mmd_squared is None:
            return f"none: {self.note}"
        return f"{self.mmd_squared:.4g}, standard error {self.standard_error:.2g}"


def motion_distance(
    first: Iterable[np.ndarray], second: Iterable[np.ndarray], *, seed: int
) -> MotionDistance:
    """Compare the motion of two sets of videos.

    Features are divided by their standard deviation over both sets. Distances can be compared only
    between sets of videos of one size, length and rate.

    Args:
        first: `motion_features` of each video; videos without them are left out.
        second: The same for the other set.
        seed: Seed of the subsets that give the standard error.
    """
    first_ND, second_MD = (
        np.array([of_video for of_video in features if np.isfinite(of_video).all()])
        for features in (first, second)
    )
    fewest = min(len(first_ND), len(second_MD))
    if fewest < MIN_VIDEOS_MMD:
        note = f"{fewest} videos of a side have a track; a distance needs {MIN_VIDEOS_MMD}"
        return MotionDistance(mmd_squared=None, standard_error=None, note=note)
    both = np.concatenate([first_ND, second_MD])
    spread_D = both.std(axis=0)
    scale_D = np.where(spread_D > 0, spread_D, 1.0)
    found = kernel_mmd(
        (first_ND - both.mean(axis=0)) / scale_D,
        (second_MD - both.mean(axis=0)) / scale_D,
        seed=seed,
    )
    return MotionDistance(mmd_squared=found.squared, standard_error=found.standard_error)
