"""What an evaluation says of VBench's dimensions besides their values: protocols, sum, cautions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.video_scores.vbench.config import VBenchConfig
from stages.video_scores.vbench.long import Protocol
from stages.video_scores.vbench.results import NORMALISATION, five_dimension_mean

_NETWORKS = {
    "subject_consistency": "dino",
    "background_consistency": "clip",
    "motion_smoothness": "amt",
    "dynamic_degree": "raft",
}
"""Setting of the network that a dimension cannot do without."""
_LONG_NETWORKS = {"subject_consistency": "dinov2", "background_consistency": "dreamsim"}
"""Setting of the network that VBench-Long compares pieces with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VBenchSide:
    """VBench's dimensions of one side."""

    name: str
    protocols: Mapping[Protocol, int]
    """Number of videos by the protocol for their length."""
    five_dimension_mean: float
    """NaN unless all five dimensions are there, by one protocol."""

    @property
    def protocol(self) -> Protocol | None:
        """The protocol of all videos; None if they differ."""
        return next(iter(self.protocols)) if len(self.protocols) == 1 else None

    @property
    def protocol_text(self) -> str:
        """Such as `VBench-Long`."""
        if self.protocol is not None:
            return self.protocol
        parts = [f"{name} for {count} videos" for name, count in sorted(self.protocols.items())]
        return ", ".join(parts) or "no video"


@dataclass(frozen=True, kw_only=True, slots=True)
class VBenchSummary:
    """VBench's dimensions of the sides."""

    sides: tuple[VBenchSide, ...]
    notes: tuple[str, ...]
    """Which dimensions are missing, and what their values do not say."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a mean that is not there is None."""
        return {
            "sides": [
                {
                    "name": side.name,
                    "protocols": dict(side.protocols),
                    "five_dimension_mean": None
                    if math.isnan(side.five_dimension_mean)
                    else side.five_dimension_mean,
                }
                for side in self.sides
            ],
            "notes": list(self.notes),
        }

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The protocol and the mean of the five dimensions, for the sides side by side."""
        means = [
            "none" if math.isnan(side.five_dimension_mean) else f"{side.five_dimension_mean:.4g}"
            for side in self.sides
        ]
        return [
            ("VBench protocol", " against ".join(side.protocol_text for side in self.sides)),
            ("five VBench dimensions, weighted mean", " against ".join(means)),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class VBenchMeasured:
    """What was measured of one side."""

    name: str
    values: Sequence[Mapping[str, float]]
    """Of each video, by name."""
    protocols: Sequence[Protocol]
    """Of each decoded video."""


def vbench_summary(
    measured: Sequence[VBenchMeasured], config: VBenchConfig, *, has_subject_motion: bool
) -> VBenchSummary:
    """Summarise VBench's dimensions of one or two sides.

    Args:
        measured: The sides.
        config: Which networks there are.
        has_subject_motion: Whether subject motion relative to the camera was measured, too.
    """
    sides = []
    for one in measured:
        counts = dict(Counter(one.protocols))
        means = {dimension: _mean_of(one.values, dimension) for dimension in NORMALISATION}
        total = five_dimension_mean(means) if len(counts) == 1 else math.nan
        sides.append(VBenchSide(name=one.name, protocols=counts, five_dimension_mean=total))
    notes = [
        *_network_notes(config, is_long=any("VBench-Long" in side.protocols for side in sides)),
        *_protocol_notes(sides),
        *_flickering_notes(measured, config),
    ]
    if config.raft is not None:
        where = "beside it" if has_subject_motion else "with structure in evaluate.scores"
        notes.append(
            "dynamic_degree is 1 for a moving camera alone; subject_motion, relative to the "
            f"camera, is {where}"
        )
    if not all(math.isnan(side.five_dimension_mean) for side in sides):
        notes.append(
            "the weighted mean of the five dimensions is not the quality score of VBench's board, "
            "which has aesthetic and imaging quality besides, and prompts for each dimension"
        )
    return VBenchSummary(sides=tuple(sides), notes=tuple(notes))


def _mean_of(videos: Sequence[Mapping[str, float]], dimension: str) -> float:
    known = [values[dimension] for values in videos if dimension in values]
    known = [value for value in known if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _network_notes(config: VBenchConfig, *, is_long: bool) -> list[str]:
    notes = []
    missing = [
        f"{dimension} (evaluate.vbench.{setting})"
        for dimension, setting in _NETWORKS.items()
        if getattr(config, setting) is None
    ]
    if missing:
        notes.append(f"VBench dimensions without a network: {', '.join(missing)}")
    within = [
        f"{dimension} (evaluate.vbench.{setting})"
        for dimension, setting in _LONG_NETWORKS.items()
        if getattr(config, setting) is None
        if getattr(config, _NETWORKS[dimension]) is not None
    ]
    if within and is_long:
        notes.append(
            f"{' and '.join(within)} from 5 s on: within pieces of 2 s only, not from piece to "
            "piece as on VBench's board"
        )
    return notes


def _protocol_notes(sides: Sequence[VBenchSide]) -> list[str]:
    notes = [
        f"{side.name} mixes VBench's protocols ({side.protocol_text}), whose values cannot be "
        "averaged: put videos of 5 s and more in a folder of their own"
        for side in sides
        if len(side.protocols) > 1
    ]
    single = {side.protocol for side in sides if side.protocols}
    if not notes and len(single) > 1:
        notes.append(
            "the sides follow different protocols of VBench, whose values cannot be compared: "
            + ", ".join(f"{side.name} {side.protocol_text}" for side in sides)
        )
    return notes


def _flickering_notes(measured: Sequence[VBenchMeasured], config: VBenchConfig) -> list[str]:
    if config.raft is None:
        return [
            "temporal_flickering is of all videos, where VBench's is of those without motion only: "
            "its filter needs evaluate.vbench.raft"
        ]
    notes = []
    for one in measured:
        known = [values.get("temporal_flickering", math.nan) for values in one.values]
        if moving := sum(math.isnan(value) for value in known):
            notes.append(
                f"temporal_flickering has no value for {moving} of {len(known)} videos of "
                f"{one.name}: it is of videos that VBench's filter finds static"
            )
    return notes
