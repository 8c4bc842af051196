"""How much two sets of videos differ in their motion, by statistics of their Gram flows.

Needs no network besides SAM2's tracks. Compared with real videos of the same kind, it says whether
generated subjects move as real ones do, whatever they look like.
"""

import math
from collections.abc import Iterable

import numpy as np

from stages.evaluate.distances import MIN_VIDEOS_MMD, Distance, kernel_mmd
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


def motion_distance(
    first: Iterable[np.ndarray], second: Iterable[np.ndarray], *, seed: int
) -> Distance:
    """Squared MMD between the motion of two sets of videos; 0 for equal motion.

    Features are divided by their standard deviation over both sets. Distances can be compared only
    between sets of videos of one size, length and rate.

    Args:
        first: `motion_features` of each video; videos without them are left out.
        second: The same for the other set.
        seed: Seed of the subsets that give the standard error.
    """
    first_ND, second_MD = _known(first), _known(second)
    fewest = min(len(first_ND), len(second_MD))
    if fewest < MIN_VIDEOS_MMD:
        note = f"{fewest} videos of a side have a track; a distance needs {MIN_VIDEOS_MMD}"
        return Distance(value=None, standard_error=None, note=note)
    both = np.concatenate([first_ND, second_MD])
    return _scaled_mmd(first_ND, second_MD, unit=both, seed=seed)


def motion_to_reference(
    side: Iterable[np.ndarray], reference: Iterable[np.ndarray], *, seed: int
) -> Distance:
    """Squared MMD between the motion of a side's videos and that of reference clips.

    Features are divided by their standard deviation over the reference alone, so that the distances
    of several sides to one reference can be compared.

    Args:
        side: `motion_features` of each video; videos without them are left out.
        reference: The same for the reference clips.
        seed: Seed of the subsets that give the standard error.
    """
    side_ND, reference_MD = _known(side), _known(reference)
    if min(len(side_ND), len(reference_MD)) < MIN_VIDEOS_MMD:
        note = (
            f"needs tracks of {MIN_VIDEOS_MMD} videos and of as many reference clips, got "
            f"{len(side_ND)} and {len(reference_MD)}"
        )
        return Distance(value=None, standard_error=None, note=note)
    return _scaled_mmd(side_ND, reference_MD, unit=reference_MD, seed=seed)


def _known(features: Iterable[np.ndarray]) -> np.ndarray:
    """float64 [videos, 12]: the features of the videos that have them."""
    return np.array([of_video for of_video in features if np.isfinite(of_video).all()])


def _scaled_mmd(
    first_ND: np.ndarray, second_MD: np.ndarray, *, unit: np.ndarray, seed: int
) -> Distance:
    """Squared MMD of features that are shifted and scaled by the statistics of `unit`."""
    centre_D, spread_D = unit.mean(axis=0), unit.std(axis=0)
    scale_D = np.where(spread_D > 0, spread_D, 1.0)
    found = kernel_mmd((first_ND - centre_D) / scale_D, (second_MD - centre_D) / scale_D, seed=seed)
    return Distance(value=found.squared, standard_error=found.standard_error)
