"""Estimate of an extraction run: clips, disk, memory and time. Writes nothing.

Clips and skips come from the dataset's headers (`survey`). Disk space is that of the stores'
arrays: exact for raw arrays, with a typical ratio for compressed ones. Memory and FLOPs come from
the models' shapes (`extract_costs`). Time is FLOPs / (the device's measured matmul rate * a typical
fraction of it). It excludes loading the models, and reading and decoding videos, which overlaps
with computation.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cache_schema import SkippedClip, StoreReader
from stages.clips import ClipsConfig, open_dataset
from stages.compute_cost.flop_counter import TRANSFORMER_RATE_FRACTION, matmul_flops_per_second
from stages.config import BaseModelConfig, Precision
from stages.dry_run.extract_costs import ModelCost
from stages.dry_run.extract_stores import (
    EncodingEstimate,
    PlannedPass,
    bytes_of,
    is_compressed,
    planned_passes,
)
from stages.dry_run.survey import MAX_PROBED, ShardSurvey, survey_shards
from stages.extract_features.config import (
    ExtractConfig,
    Kind,
    LatentsConfig,
    PromptSource,
    TextConfig,
    VisualConfig,
)
from stages.extract_features.execution.comparison import (
    Comparison,
    Readers,
    StoreScope,
    compare,
    raise_if_other_dataset,
)
from stages.extract_features.fingerprints import read_sources
from stages.extract_features.kinds import TRACKED_KINDS, resolve_device
from stages.precision import DTYPES
from stages.progress import Progress

MATMUL_RATE_FRACTION: Mapping[str, Mapping[Kind, float]] = {
    "cpu": {
        "text": TRANSFORMER_RATE_FRACTION["cpu"],
        "latents": 0.85,
        "visual": 0.7,
        **dict.fromkeys(TRACKED_KINDS, 0.65),
    },
    "cuda": {
        "text": TRANSFORMER_RATE_FRACTION["cuda"],
        "latents": 0.3,
        "visual": 0.3,
        **dict.fromkeys(TRACKED_KINDS, 0.25),
    },
}
"""Typical fraction of the matmul rate that a model reaches, by device type. For a CPU, measured on
one thread with two layers half as wide as T5-XXL, a VAE of the official widths, and sam2.1_hiera_t
at 512 pixels; visual's is assumed. For a GPU, assumed. Models of a few million weights reach a
tenth of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KindEstimate:
    """Estimate for one store."""

    kind: Kind
    bucket: str | None
    """Size bucket of its clips; None without buckets, and for text."""
    store: Path | None
    """None if the weights, whose hash is part of its name, are not on this machine."""
    clips: int
    """Clips to extract."""
    clips_already_there: int
    """Clips in finished shards, without skipped ones."""
    skipped_count: int
    """Remaining clips that would be skipped."""
    skipped: tuple[SkippedClip, ...]
    """The skipped clips among those whose headers were read."""
    bytes_per_clip: int | None
    """Size of the arrays; checksums and records add well under 1%."""
    compressed: bool
    """Whether the size is approximate, because of compression."""

    @property
    def name(self) -> str:
        """The kind, and the size bucket if there are buckets."""
        return self.kind if self.bucket is None else f"{self.kind} {self.bucket}"

    @property
    def bytes(self) -> int | None:
        """Bytes that the run would add; None if unknown."""
        return None if self.bytes_per_clip is None else self.clips * self.bytes_per_clip


@dataclass(frozen=True, kw_only=True, slots=True)
class PassEstimate:
    """Estimate for one model; teacher, gram_flow and masks are written in one pass."""

    kinds: tuple[Kind, ...]
    bucket: str | None
    """Size bucket of its clips; None without buckets, and for text."""
    clips: int
    """Clips that the model processes."""
    cost: ModelCost | None
    """Cost per clip and in memory; None if unknown."""
    flops: float | None
    flops_per_second: float
    """Matmul rate measured on this device."""
    assumed_peak_fraction: float
    """Assumed fraction of that rate."""

    @property
    def seconds(self) -> float | None:
        """Time on one worker with this device."""
        if self.flops is None:
            return None
        return self.flops / (self.flops_per_second * self.assumed_peak_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Estimate of a whole run. The names of fields and properties are the keys of `--json`."""

    dataset: str
    """The detected dataset layout."""
    shards: int
    clips: int
    """Clips of the dataset, including bad records."""
    frames_per_clip: tuple[int, ...]
    """Number of frames of a clip, for every size."""
    dataset_bytes: int
    clips_probed: int
    """Clips whose headers were read; counts are extrapolated to the others."""
    prompts: Mapping[PromptSource, int]
    """Number of probed clips per prompt source."""
    conversions: Mapping[str, int]
    """Number of probed clips per conversion of frames: deinterlaced, tone-mapped, …."""
    kinds: tuple[KindEstimate, ...]
    passes: tuple[PassEstimate, ...]
    forms: tuple[EncodingEstimate, ...]
    """Encodings of the teacher signal, if SAM2 runs."""
    device: str
    device_bytes: int
    """Memory of the device."""
    free_bytes: int
    """Free space on the disk of the cache."""
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes that the run would write, as far as known."""
        return sum(kind.bytes or 0 for kind in self.kinds)

    @property
    def seconds(self) -> float:
        """Time of all passes on one worker, as far as known."""
        return sum(one.seconds or 0.0 for one in self.passes)


def estimate(
    config: ExtractConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path,
    *,
    progress: Progress,
    max_probed: int = MAX_PROBED,
    retry_failed: bool = False,
    refresh_changed: bool = False,
) -> Estimate:
    """Estimate a run of `extract_features` with the same arguments.

    Args:
        config: Kinds to extract, and where to run.
        clips: The dataset, and the size, length and frame rate of clips.
        model: The base pipeline; for a hub id only configuration files are downloaded.
        cache_root: Folder of the stores; need not exist.
        progress: Shows bars.
        max_probed: Approximate maximum number of clips whose headers are read.
        retry_failed: As in `extract_features`.
        refresh_changed: As in `extract_features`.

    Raises:
        ValueError: A setting is wrong, or a store has clips from other sources than the dataset's,
            with the message of the run itself. All clips are compared.
        CacheError: A store in the cache is damaged.
    """
    device = resolve_device(config.device, 0)
    dataset = open_dataset(clips)
    plans = planned_passes(config, clips, model)
    comparison = Comparison()
    if any(reader and reader.shards for _, reader in _open_stores(plans, cache_root)):
        for kind in config.kinds:
            found = (reader for one, reader in _open_stores(plans, cache_root) if one == kind)
            raise_if_other_dataset(kind, [reader for reader in found if reader], dataset)
        sources = read_sources(dataset.shards, config.kinds, config.teacher, progress)
        scope = StoreScope(covers=lambda _: True)
        comparison = compare(_open_stores(plans, cache_root), sources, scope)
    if not refresh_changed:
        comparison.raise_if_changed()
    missing = _MissingClips(
        comparison=comparison, retry_failed=retry_failed, refresh_changed=refresh_changed
    )
    by_size = survey_shards(dataset.shards, config, clips, progress, max_probed=max_probed)
    kinds: list[KindEstimate] = []
    passes: list[PassEstimate] = []
    forms: list[EncodingEstimate] = []
    for plan in plans:
        surveys = by_size[plan.bucket]
        size = sum(earlier.kinds == plan.kinds for earlier in plans[: plans.index(plan)])
        for kind in plan.kinds:
            remaining = _Remaining.of(surveys, missing.of((kind,), size))
            kinds.append(_kind(kind, plan, remaining, missing.num_held(kind, size), cache_root))
        # A clip that only one of a pass's stores lacks is tracked again.
        passes.append(
            _pass(plan, _Remaining.of(surveys, missing.of(plan.kinds, size)), config, device)
        )
        kept = _Remaining.of(surveys, None).kept(plan.kinds[0])
        forms += [replace(form, clips=round(kept)) for form in plan.encodings]
    surveys = by_size[None]
    probed = [survey for survey in surveys if survey.probed]
    every = [survey for of_size in by_size.values() for survey in of_size]
    prompts = sum((survey.prompts for survey in every), Counter[PromptSource]())
    return Estimate(
        dataset=dataset.layout,
        shards=len(surveys),
        clips=sum(survey.num_clips for survey in surveys),
        frames_per_clip=tuple(size.num_frames for size in clips.sizes),
        dataset_bytes=sum(survey.num_bytes for survey in surveys),
        clips_probed=sum(survey.num_clips for survey in probed),
        prompts=prompts,
        conversions=sum((survey.conversions for survey in every), Counter[str]()),
        kinds=tuple(kinds),
        passes=tuple(passes),
        forms=tuple(forms),
        device=_name_of(device),
        device_bytes=_memory_of(device),
        free_bytes=_free_bytes(cache_root),
        notes=tuple(
            dict.fromkeys([*(note for plan in plans for note in plan.notes), *comparison.notes()])
        ),
    )


Keys = Mapping[str, frozenset[str]]
"""Keys of clips by shard name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _MissingClips:
    """Clips of the dataset that a run would find missing in the stores."""

    comparison: Comparison
    retry_failed: bool
    refresh_changed: bool

    def of(self, kinds: Sequence[Kind], size: int) -> Keys | None:
        """Return the clips that a run would process for some kinds; None for all."""
        sources = self.comparison.sources
        if sources is None:
            return None
        wanted = [
            self.comparison.kinds[kind].wanted_N(
                size, retry_failed=self.retry_failed, refresh_changed=self.refresh_changed
            )
            for kind in kinds
        ]
        return sources.keys_by_shard(np.logical_or.reduce(wanted))

    def num_held(self, kind: Kind, size: int) -> int:
        """Return the number of the dataset's clips that a store holds and keeps."""
        if self.comparison.sources is None:
            return 0
        store = self.comparison.kinds[kind].stores[size]
        return int(np.count_nonzero(store.held_N & ~store.changed_N))


@dataclass(frozen=True, slots=True)
class _Remaining:
    """Clips that a store lacks, and the probed ones that counts are extrapolated from."""

    num_clips: int
    probed: tuple[ShardSurvey, ...]

    @classmethod
    def of(cls, surveys: Sequence[ShardSurvey], keys: Keys | None) -> "_Remaining":
        probed = tuple(survey for survey in surveys if survey.probed)
        if keys is None:
            return cls(sum(survey.num_clips for survey in surveys), probed)
        chosen = [one.of_clips(keys[one.name]) for one in probed if one.name in keys]
        # If none of them was probed, extrapolate from all probed clips.
        return cls(sum(map(len, keys.values())), tuple(chosen) or probed)

    def extrapolate(self, counted: float) -> float:
        """Extrapolate a count over the probed clips."""
        probed = sum(survey.num_clips for survey in self.probed)
        return counted * self.num_clips / probed if probed else 0.0

    def kept(self, kind: Kind) -> float:
        """Return the estimated number of clips of this size that would not be skipped."""
        other_size = sum(len(survey.other_size) for survey in self.probed)
        return self.num_clips - self.extrapolate(len(self.skipped(kind)) + other_size)

    def subjects(self) -> float:
        """Return the estimated number of tracked subjects."""
        return self.extrapolate(sum(sum(survey.subjects.values()) for survey in self.probed))

    def skipped(self, kind: Kind) -> tuple[SkippedClip, ...]:
        """Return the probed clips that would be skipped."""
        return tuple(clip for survey in self.probed for clip in survey.skipped.get(kind, ()))


def _open_stores(plans: Sequence[PlannedPass], cache_root: Path) -> Readers:
    for plan in plans:
        for kind in plan.kinds:
            store = None if plan.folders is None else cache_root / plan.folders[kind]
            is_there = store is not None and (store / "store.json").is_file()
            yield kind, StoreReader(store) if store is not None and is_there else None


def _kind(
    kind: Kind, plan: PlannedPass, remaining: _Remaining, num_held: int, cache_root: Path
) -> KindEstimate:
    skipped = remaining.skipped(kind)
    arrays = None if plan.arrays is None else plan.arrays[kind]
    return KindEstimate(
        kind=kind,
        bucket=plan.bucket,
        store=None if plan.folders is None else cache_root / plan.folders[kind],
        clips=round(remaining.kept(kind)),
        clips_already_there=num_held,
        skipped_count=round(remaining.extrapolate(len(skipped))),
        skipped=skipped if remaining.num_clips else (),
        bytes_per_clip=None if arrays is None else bytes_of(arrays),
        compressed=arrays is not None and is_compressed(arrays),
    )


def _pass(
    plan: PlannedPass, remaining: _Remaining, config: ExtractConfig, device: torch.device
) -> PassEstimate:
    kind = plan.kinds[0]
    cost, num_clips = plan.cost, remaining.kept(kind)
    return PassEstimate(
        kinds=plan.kinds,
        bucket=plan.bucket,
        clips=round(num_clips),
        cost=cost,
        flops=None if cost is None else cost.flops(num_clips, remaining.subjects()),
        flops_per_second=matmul_flops_per_second(device, DTYPES[_precision(config, kind)]),
        assumed_peak_fraction=MATMUL_RATE_FRACTION[device.type][kind],
    )


def _precision(config: ExtractConfig, kind: Kind) -> Precision:
    if kind in TRACKED_KINDS:
        return config.teacher.precision
    section: TextConfig | LatentsConfig | VisualConfig = getattr(config, kind)
    return section.precision


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} with {torch.get_num_threads()} threads"


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes(cache_root: Path) -> int:
    """Return the free bytes on the disk of the cache folder, which may not exist yet."""
    folder = cache_root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
