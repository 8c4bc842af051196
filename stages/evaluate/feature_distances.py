"""Distances between sets of videos over the features of a network: Frechet (FVD) and MMD (KVD)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.clips import BadRecord, ClipRecord
from stages.evaluate.distances import (
    MIN_VIDEOS_FRECHET,
    MIN_VIDEOS_MMD,
    Distance,
    frechet_distance,
    kernel_mmd,
)
from stages.evaluate.reference import Reference
from stages.evaluate.videos import Side
from stages.progress import Progress
from stages.video_features.clip_features import features_of_clips
from stages.video_features.config import FeaturesConfig
from stages.video_features.network import FeatureNetwork, FeatureProtocol

# Legend: N M videos of the first and second set, D feature dimensions.


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureDistance:
    """The distances between two sets of videos."""

    first: str
    second: str
    videos: tuple[int, int]
    """Number of videos of each set that have features."""
    frechet: Distance
    """Squared Frechet distance; without a standard error."""
    mmd: Distance
    """Squared MMD."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureEvaluation:
    """Distances between the sides, and between each side and the reference, if there is one."""

    protocol: FeatureProtocol
    """What the features, and so the distances, depend on."""
    distances: tuple[FeatureDistance, ...]
    names: tuple[str, ...]
    """The sides, then the reference."""
    problems: tuple[Mapping[str, str], ...]
    """Why clips have no features, by key, for each of `names`."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Name and text of each distance, with the number of videos."""
        return [
            (
                f"{name}, {one.first} to {one.second}",
                f"{distance.text}; {one.videos[0]} and {one.videos[1]} videos",
            )
            for one in self.distances
            for name, distance in (("Frechet", one.frechet), ("MMD^2", one.mmd))
        ]

    @property
    def problem_rows(self) -> list[tuple[str, str, str]]:
        """Set, key and reason of each clip without features."""
        return [
            (name, key, f"no features: {why}")
            for name, problems in zip(self.names, self.problems, strict=True)
            for key, why in sorted(problems.items())
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **self.protocol.summary,
            "distances": [asdict(one) for one in self.distances],
            "sets": [
                {"name": name, "problems": dict(sorted(problems.items()))}
                for name, problems in zip(self.names, self.problems, strict=True)
            ],
        }


def compare_features(
    network: FeatureNetwork,
    sides: Sequence[Side],
    reference: Reference | None,
    config: FeaturesConfig,
    *,
    folder: Path,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> FeatureEvaluation:
    """Compute the features of all sets, and the distances between them.

    Of a set with more than `config.max_clips` clips, so many are taken, spread evenly over it.

    Args:
        network: The network.
        sides: One or two sides.
        reference: Real clips, to which every side is compared.
        config: Limits.
        folder: Folder of the features of all networks and sets.
        device: Device of the network.
        seed: Seed of the subsets that give the standard error.
        progress: Shows a bar per set.

    Raises:
        ValueError: A file in the folder is damaged, or the network fails on a clip.
    """
    sets: list[tuple[str, Iterable[ClipRecord | BadRecord], int]] = [
        (side.name, _records_of_side(side), len(side.videos)) for side in sides
    ]
    if reference is not None:
        sets.append((reference.name, _records_of_reference(reference), len(reference.captions)))
    found = [
        features_of_clips(
            _spread(records, count, config.max_clips),
            network,
            folder,
            device=device,
            name=name,
            total=min(count, config.max_clips),
            progress=progress,
        )
        for name, records, count in sets
    ]
    names = tuple(name for name, _, _ in sets)
    last = len(sets) - 1
    pairs = [(0, 1)] if len(sides) == 2 else []
    if reference is not None:
        pairs = [*((side, last) for side in range(last)), *pairs]
    return FeatureEvaluation(
        protocol=network.protocol,
        distances=tuple(
            feature_distance(
                (names[first], found[first].features_ND),
                (names[second], found[second].features_ND),
                allow_few=config.allow_few,
                seed=seed,
            )
            for first, second in pairs
        ),
        names=names,
        problems=tuple(one.problems for one in found),
    )


def feature_distance(
    first: tuple[str, np.ndarray], second: tuple[str, np.ndarray], *, allow_few: bool, seed: int
) -> FeatureDistance:
    """The distances between two sets; those that too few videos do not allow have a note instead.

    Args:
        first: Name of a set, and its features_ND.
        second: The same of another, features_MD.
        allow_few: Compute the Frechet distance of fewer than `MIN_VIDEOS_FRECHET` videos.
        seed: Seed of the subsets that give the standard error.
    """
    (first_name, first_ND), (second_name, second_MD) = first, second
    return FeatureDistance(
        first=first_name,
        second=second_name,
        videos=(len(first_ND), len(second_MD)),
        frechet=_frechet(first_ND, second_MD, allow_few=allow_few),
        mmd=_mmd(first_ND, second_MD, seed=seed),
    )


def _frechet(first_ND: np.ndarray, second_MD: np.ndarray, *, allow_few: bool) -> Distance:
    fewest = min(len(first_ND), len(second_MD))
    if fewest < 2:
        return _none(f"{fewest} videos have features, and it needs {MIN_VIDEOS_FRECHET}")
    few = fewest < MIN_VIDEOS_FRECHET
    if few and not allow_few:
        return _none(
            f"it needs {MIN_VIDEOS_FRECHET} videos, because its bias is large for few; compare by "
            "MMD^2, or set evaluate.features.allow_few=true"
        )
    note = f"biased, compare only sets of {fewest} videos" if few else ""
    value = frechet_distance(first_ND, second_MD, allow_few=allow_few)
    return Distance(value=value, standard_error=None, note=note)


def _mmd(first_ND: np.ndarray, second_MD: np.ndarray, *, seed: int) -> Distance:
    fewest = min(len(first_ND), len(second_MD))
    if fewest < MIN_VIDEOS_MMD:
        return _none(f"{fewest} videos have features, and it needs {MIN_VIDEOS_MMD}")
    mmd = kernel_mmd(first_ND, second_MD, seed=seed)
    return Distance(value=mmd.squared, standard_error=mmd.standard_error)


def _none(note: str) -> Distance:
    return Distance(value=None, standard_error=None, note=note)


def _records_of_side(side: Side) -> Iterator[ClipRecord]:
    for video in side.videos:
        yield ClipRecord(key=video.key, video=video.path)


def _records_of_reference(reference: Reference) -> Iterator[ClipRecord | BadRecord]:
    for shard in reference.dataset.shards:
        yield from shard.records()


def _spread(
    records: Iterable[ClipRecord | BadRecord], count: int, most: int
) -> Iterator[ClipRecord | BadRecord]:
    """At most `most` of `count` records, evenly spread."""
    for number, record in enumerate(records):
        if count <= most or number * most // count != (number + 1) * most // count:
            yield record
