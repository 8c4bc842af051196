"""What a run of stage one would take, before it starts; `extract-features --dry-run` prints it.

Clips and what would be skipped come from the dataset's headers (`survey`). Disk is that of the
stores' arrays: exact where they are stored raw, by a usual share where they are compressed. Memory
and operations come from the models' shapes (`model_costs`). Time is operations over this device's
measured rate of matrix products times a usual share of it; reading and decoding videos, which
overlap with the models' work, and loading them are not in it. Writes nothing.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache_schema import SkippedClip, StoreReader
from stages.clips import ClipsConfig, open_dataset
from stages.compute_cost.flop_counter import matmul_flops_per_second
from stages.config import BaseModelConfig, Precision
from stages.dry_run.extract_costs import ModelCost, TrackerCost
from stages.dry_run.extract_stores import (
    FormSize,
    PlannedPass,
    bytes_of,
    is_compressed,
    planned_passes,
)
from stages.dry_run.survey import MAX_PROBED, ShardSurvey, survey_shards
from stages.extract_features.config import ExtractConfig, Kind, PromptSource
from stages.extract_features.execution.comparison import (
    Comparison,
    Readers,
    StoreScope,
    compare,
    raise_if_other_dataset,
)
from stages.extract_features.execution.dataset_sources import read_sources
from stages.extract_features.kinds import TRACKED_KINDS, device_named
from stages.precision import DTYPES
from stages.progress import Progress

MATMUL_RATE_FRACTION: Mapping[str, Mapping[Kind, float]] = {
    "cpu": {"text": 0.7, "latents": 0.85, **dict.fromkeys(TRACKED_KINDS, 0.65)},
    "cuda": {"text": 0.3, "latents": 0.3, **dict.fromkeys(TRACKED_KINDS, 0.25)},
}
"""What a model reaches of the rate of matrix products, by device. On a CPU as measured on one
thread: two layers as wide as half of T5-XXL, a VAE of the official widths, sam2.1_hiera_t at 512
pixels. On a GPU assumed, not measured. Models of a few million weights reach a tenth of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KindEstimate:
    """One kind of store."""

    kind: Kind
    bucket: str | None
    """The size of its clips, where there are several; None for text too."""
    store: Path | None
    """None when the weights, whose hash names it, are not on this machine."""
    clips_already_there: int
    """In finished shards, skipped ones not counted."""
    clips: int
    """Still to be extracted."""
    skipped: int
    """Of those that are left, clips that would be skipped."""
    skipped_clips: tuple[SkippedClip, ...]
    """The same one by one, of the clips whose headers were read."""
    bytes_per_clip: int | None
    """Of the arrays; the store adds checksums and records, well under 1%."""
    is_compressed: bool
    """The size is about this."""

    @property
    def name(self) -> str:
        """The kind, and the size where there are several."""
        return self.kind if self.bucket is None else f"{self.kind} {self.bucket}"

    @property
    def bytes(self) -> int | None:
        """That the run would add; None when it cannot be known."""
        return None if self.bytes_per_clip is None else self.clips * self.bytes_per_clip


@dataclass(frozen=True, kw_only=True, slots=True)
class PassEstimate:
    """One model's work; teacher, gram_flow and masks come from one pass."""

    kinds: tuple[Kind, ...]
    bucket: str | None
    """The size of its clips, where there are several; None for text too."""
    clips: int
    """That go through the model."""
    cost: ModelCost | None
    """Of one clip, and in memory; None when it cannot be known."""
    flops: float | None
    flops_per_second: float
    """Of matrix products on this device, measured just now."""
    usual_share: float
    """Of that rate, by which the time is reckoned."""

    @property
    def seconds(self) -> float | None:
        """On one worker like this one."""
        if self.flops is None:
            return None
        return self.flops / (self.flops_per_second * self.usual_share)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormEstimate:
    """One form of the teacher, whether the run writes it or not."""

    size: FormSize
    bucket: str | None
    """The size of its clips, where there are several."""
    clips: int
    """Of the dataset, without those that would be skipped."""

    @property
    def bytes(self) -> int:
        """For the whole dataset."""
        return self.clips * self.size.bytes_per_clip


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The whole run."""

    dataset: str
    """Which layout was recognised."""
    shards: int
    clips: int
    """Of the dataset, bad records included."""
    frames_per_clip: tuple[int, ...]
    """Of every size."""
    dataset_bytes: int
    clips_probed: int
    """Whose headers were read; what is said of the others is in proportion."""
    prompts: Mapping[PromptSource, int]
    """How many of the clips probed are prompted by which source."""
    conversions: Mapping[str, int]
    """How many of the clips probed have frames that are deinterlaced, tone-mapped, …."""
    kinds: tuple[KindEstimate, ...]
    passes: tuple[PassEstimate, ...]
    forms: tuple[FormEstimate, ...]
    """Of the teacher, where SAM2 runs."""
    device: str
    device_bytes: int
    """Memory of the device."""
    free_bytes: int
    """On the disk of the cache."""
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """That the run would write, as far as it is known."""
        return sum(kind.bytes or 0 for kind in self.kinds)

    @property
    def seconds(self) -> float:
        """Of all passes on one worker, as far as it is known."""
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
    """Reckon what `extract_features` with the same arguments would do.

    Args:
        config: What to compute, and where.
        clips: The dataset, and the size, length and rate of its clips.
        model: The base pipeline; of a hub id only configuration files are downloaded.
        cache_root: Folder of the stores; need not exist.
        progress: Bars.
        max_probed: About how many clips' headers are read, at most.
        retry_failed: As of the run.
        refresh_changed: As of the run.

    Raises:
        ValueError: A setting does not fit, or a store was made from other sources than the
            dataset's, as the run would say. All clips are compared.
        CacheError: A store in the cache is damaged.
    """
    device = device_named(config.device, 0)
    dataset = open_dataset(clips)
    plans = planned_passes(config, clips, model)
    comparison = Comparison()
    if any(reader and reader.shards for _, reader in _open_stores(plans, cache_root)):
        for kind in config.kinds:
            found = (reader for one, reader in _open_stores(plans, cache_root) if one == kind)
            raise_if_other_dataset(kind, [reader for reader in found if reader], dataset)
        sources = read_sources(dataset.shards, config.kinds, config.teacher, progress)
        share = StoreScope(covers=lambda _: True)
        comparison = compare(_open_stores(plans, cache_root), sources, share)
    if not refresh_changed:
        comparison.raise_if_changed()
    missing = _MissingClips(
        comparison=comparison, retry_failed=retry_failed, refresh_changed=refresh_changed
    )
    by_size = survey_shards(dataset.shards, config, clips, progress, max_probed=max_probed)
    kinds: list[KindEstimate] = []
    passes: list[PassEstimate] = []
    forms: list[FormEstimate] = []
    for plan in plans:
        surveys = by_size[plan.bucket]
        size = sum(earlier.kinds == plan.kinds for earlier in plans[: plans.index(plan)])
        for kind in plan.kinds:
            remaining = _Remaining.of(surveys, missing.of((kind,), size))
            kinds.append(_kind(kind, plan, remaining, missing.num_held(kind, size), cache_root))
        # A clip that one of two stores lacks is gone through again for it.
        passes.append(
            _pass(plan, _Remaining.of(surveys, missing.of(plan.kinds, size)), config, device)
        )
        kept = _Remaining.of(surveys, None).kept(plan.kinds[0])
        forms += [
            FormEstimate(size=size, bucket=plan.bucket, clips=round(kept)) for size in plan.forms
        ]
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
"""Clips, by the name of their shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _MissingClips:
    """What the stores lack of the dataset, as a run would see it."""

    comparison: Comparison
    retry_failed: bool
    refresh_changed: bool

    def of(self, kinds: Sequence[Kind], size: int) -> Keys | None:
        """The clips that a run would go through for some kinds; None for all."""
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
        """Clips of the dataset that a store holds and keeps."""
        if self.comparison.sources is None:
            return 0
        store = self.comparison.kinds[kind].stores[size]
        return int(np.count_nonzero(store.held_N & ~store.changed_N))


@dataclass(frozen=True, slots=True)
class _Remaining:
    """The clips that a store lacks, and how far those probed speak for them."""

    num_clips: int
    probed: tuple[tuple[ShardSurvey, frozenset[str] | None], ...]
    """Shards whose headers were read, and which of their clips count; None for all."""

    @classmethod
    def of(cls, surveys: Sequence[ShardSurvey], keys: Keys | None) -> "_Remaining":
        everywhere = tuple((survey, None) for survey in surveys if survey.probed)
        if keys is None:
            return cls(sum(survey.num_clips for survey in surveys), everywhere)
        probed = tuple(
            (survey, keys[survey.name])
            for survey in surveys
            if survey.probed and survey.name in keys
        )
        # Where none of them was probed, the others speak for them.
        return cls(sum(map(len, keys.values())), probed or everywhere)

    def extrapolate(self, counted: float) -> float:
        """What was counted among the clips that were probed, in proportion."""
        probed = sum(
            survey.num_clips if keys is None else len(keys) for survey, keys in self.probed
        )
        return counted * self.num_clips / probed if probed else 0.0

    def kept(self, kind: Kind) -> float:
        """Clips of this size that would not be skipped."""
        other_size = sum(
            len(survey.other_size if keys is None else survey.other_size & keys)
            for survey, keys in self.probed
        )
        return self.num_clips - self.extrapolate(len(self.skipped(kind)) + other_size)

    def subjects(self) -> float:
        """Subjects that would be tracked."""
        return self.extrapolate(
            sum(
                count
                for survey, keys in self.probed
                for key, count in survey.subjects.items()
                if keys is None or key in keys
            )
        )

    def skipped(self, kind: Kind) -> tuple[SkippedClip, ...]:
        """Clips that would be skipped, of those that were probed."""
        return tuple(
            clip
            for survey, keys in self.probed
            for clip in survey.skipped.get(kind, ())
            if keys is None or clip.key in keys
        )


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
    num_skipped = round(remaining.extrapolate(len(skipped)))
    return KindEstimate(
        kind=kind,
        bucket=plan.bucket,
        store=None if plan.folders is None else cache_root / plan.folders[kind],
        clips_already_there=num_held,
        clips=round(remaining.kept(kind)),
        skipped=num_skipped,
        skipped_clips=skipped if remaining.num_clips else (),
        bytes_per_clip=None if plan.arrays is None else bytes_of(plan.arrays[kind]),
        is_compressed=plan.arrays is not None and is_compressed(plan.arrays[kind]),
    )


def _pass(
    plan: PlannedPass, remaining: _Remaining, config: ExtractConfig, device: torch.device
) -> PassEstimate:
    kind = plan.kinds[0]
    num_clips = remaining.kept(kind)
    cost, flops = plan.cost, None
    if isinstance(cost, TrackerCost):
        flops = cost.flops(num_clips, remaining.subjects())
        cost = cost.cost
    elif cost is not None:
        flops = num_clips * cost.flops_per_clip
    return PassEstimate(
        kinds=plan.kinds,
        bucket=plan.bucket,
        clips=round(num_clips),
        cost=cost,
        flops=flops,
        flops_per_second=matmul_flops_per_second(device, DTYPES[_precision(config, kind)]),
        usual_share=MATMUL_RATE_FRACTION[device.type][kind],
    )


def _precision(config: ExtractConfig, kind: Kind) -> Precision:
    if kind == "text":
        return config.text.precision
    return config.latents.precision if kind == "latents" else config.teacher.precision


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} with {torch.get_num_threads()} threads"


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes(cache_root: Path) -> int:
    """On the disk where the cache lies or will lie."""
    folder = cache_root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
