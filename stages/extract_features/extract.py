"""Stage one from end to end: every kind over the dataset's shards; the pipeline calls it."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache_schema import JSON, StoreReader, StoreWriter
from stages.clips import ClipDataset, ClipsConfig, input_shard_name, open_dataset
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.extraction import Extraction, bucket_name
from stages.extract_features.make_extractions import device_named, make_extractions
from stages.extract_features.summary import ExtractSummary, KindSummary
from stages.extract_features.work.comparison import Comparison
from stages.extract_features.work.dataset_sources import DatasetSources
from stages.extract_features.work.failure_manifest import FAILURES_FILE, failures_listed
from stages.extract_features.work.jobs import JobPlan, ShardJob, pending_jobs, plan_jobs
from stages.extract_features.work.local_engine import EngineReport, LocalEngine
from stages.extract_features.work.ray_engine import RayEngine
from stages.extract_features.work.ray_worker import WorkerSetup
from stages.extract_features.work.refresh import compare_and_refresh
from stages.other_writers import wait_for_others
from stages.progress import Progress


def extract_features(
    config: ExtractConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path,
    *,
    provenance: dict[str, JSON],
    progress: Progress,
    rank: int = 0,
    world_size: int = 1,
    retry_failed: bool = False,
    refresh_changed: bool = False,
) -> ExtractSummary:
    """Write the stores of `config.kinds` for every shard of the dataset.

    One model after the other, so that one big model is loaded at a time; with `clips.buckets`, one
    size after the other, each into stores of its own, and every clip into those of one size.

    Before any work every clip of the dataset is compared with what the stores made theirs from.
    What a store lacks is extracted; clips that a finished shard lacks go into further shards, and
    nothing finished is written again. An unfinished shard goes on after the clips that are safely
    staged. Shards that other processes are writing are waited for, and taken over if such a process
    ends before its shard is done. Clips that have left the dataset stay in the store. A clip that
    cannot be used is recorded with its reason and skipped; `failures.jsonl` in the cache folder
    lists all of them afterwards, also when an error ended the run.

    Args:
        config: What to compute, and where.
        clips: The dataset, and the size, length and rate of its clips.
        model: The base pipeline whose VAE and text encoder are used.
        cache_root: Folder of the stores; made when missing.
        provenance: Facts about the run, kept in stores that this run creates.
        progress: Bars and lines.
        rank: This process's number; it begins with the shards rank, rank + world_size, ... and goes
            on to what the others have not finished.
        world_size: Number of processes at work.
        retry_failed: Take the clips again that finished shards left out; what comes of them goes
            into further shards, and nothing finished is touched.
        refresh_changed: Make clips again whose source (caption, video or prompt, whatever the kind
            depends on) is another one than the store's; the rest of their shards is kept.

    Raises:
        ValueError: A setting does not fit, before any work is done: dataset, base model, SAM2
            checkpoint, device or Ray is missing or wrong.
            Or a store holds clips made from other sources, without `refresh_changed`.
        CacheError: A store is damaged.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world size {world_size}): {rank}")
    if config.engine == "ray" and world_size > 1:
        raise ValueError(
            f"extract.engine=ray starts its own workers, but a launcher started {world_size} "
            "processes; run it without torchrun, or with extract.engine=local"
        )
    dataset = open_dataset(clips)
    if rank == 0:
        progress.log(f"dataset: {dataset.layout}")
    engine: RayEngine | LocalEngine
    if config.engine == "ray":
        setup = WorkerSetup(
            config=config,
            clips=clips,
            model=model,
            cache_root=cache_root.expanduser().resolve(),
            folder=Path.cwd(),
        )
        engine = RayEngine(setup, dataset.by_name)
    else:
        device = device_named(config.device, rank)
        engine = LocalEngine(dataset.by_name, config.teacher, device, rank, world_size)
    extractions = make_extractions(config, clips.sizes, model)
    with engine:
        stores = [
            {
                kind: StoreWriter.open(cache_root, settings, provenance=provenance)
                for kind, settings in extraction.settings.items()
            }
            for extraction in extractions
        ]
        with failures_listed(cache_root, progress.log):
            comparison = compare_and_refresh(
                cache_root, dataset, config, stores, progress, refresh_changed=refresh_changed
            )
            summaries = _fill(
                engine, dataset, extractions, stores, comparison, progress, retry_failed
            )
    return ExtractSummary(
        kinds=tuple(summaries),
        dataset=dataset.layout,
        failures=cache_root / FAILURES_FILE,
        notes=tuple(comparison.told()),
    )


def _fill(
    engine: RayEngine | LocalEngine,
    dataset: ClipDataset,
    extractions: Sequence[Extraction],
    stores: Sequence[Mapping[Kind, StoreWriter]],
    comparison: Comparison,
    progress: Progress,
    retry_failed: bool,
) -> list[KindSummary]:
    sizes = Counter[tuple[Kind, ...]]()
    plans = []
    for writers in stores:
        kinds = tuple(writers)
        plans.append(
            plan_jobs(dataset, writers, comparison, size=sizes[kinds], retry_failed=retry_failed)
        )
        sizes[kinds] += 1
    works = [
        _Work(extraction, writers, plan)
        for extraction, writers, plan in zip(extractions, stores, plans, strict=True)
    ]
    unfinished = True
    while unfinished:
        for work in works:
            work.run(engine, progress)
        wait_for_others(lambda: _left(works), progress)
        unfinished = bool(_left(works))
    return [
        _summary(kind, writer, work, dataset, comparison.sources)
        for work in works
        for kind, writer in work.writers.items()
    ]


def _left(works: Sequence["_Work"]) -> dict[str, bool]:
    return {name: busy for work in works for name, busy in work.left().items()}


class _Work:
    """One extraction's part of a run, and what came of it."""

    def __init__(
        self, extraction: Extraction, writers: Mapping[Kind, StoreWriter], plan: JobPlan
    ) -> None:
        self.extraction = extraction
        self.writers = writers
        self.report = EngineReport()
        self.seconds = 0.0
        self._plan = plan
        self._unfinished = list(plan.jobs)

    def run(self, engine: RayEngine | LocalEngine, progress: Progress) -> None:
        """Do what is left and nobody else is at."""
        started = time.perf_counter()
        if not all(map(self._is_busy, pending_jobs(self._unfinished, self.writers))):
            report = engine.run(self.extraction, self.writers, self._plan, progress)
            self.report.written += report.written
            self.report.captions_cut += report.captions_cut
            self._unfinished = pending_jobs(self._unfinished, self.writers)
        self.seconds += time.perf_counter() - started

    def left(self) -> dict[str, bool]:
        """The unfinished shards, and whether another process is writing them."""
        self._unfinished = [job for job in self._unfinished if job.is_pending(self.writers)]
        kinds = " and ".join(self.writers)
        return {f"{kinds} {job.name}": self._is_busy(job) for job in self._unfinished}

    def _is_busy(self, job: ShardJob) -> bool:
        return any(self.writers[kind].is_busy(job.name) for kind in job.keys)


def _summary(
    kind: Kind,
    writer: StoreWriter,
    work: _Work,
    dataset: ClipDataset,
    sources: DatasetSources | None,
) -> KindSummary:
    """What the store holds of the dataset, whoever wrote it, and what this process did."""
    writer.write_index()
    reader = StoreReader(writer.path)
    of_dataset = {
        name: facts
        for name, facts in reader.shards.items()
        if input_shard_name(name, dataset) is not None
    }
    written = work.report.written[kind]
    if sources is None:
        held = sum(facts.num_clips for facts in of_dataset.values())
    else:
        held = int(np.count_nonzero(reader.keys.rows_of(sources.keys) >= 0))
    return KindSummary(
        kind=kind,
        bucket=bucket_name(work.extraction.size),
        store=writer.path,
        clips_written=written,
        clips_already_there=held - written,
        skipped=tuple(
            clip
            for clip in reader.skipped
            if (clip.shard in of_dataset if sources is None else clip.key in sources.keys)
        ),
        seconds=work.seconds,
        bytes=sum(facts.num_bytes for facts in of_dataset.values()),
        captions_cut=work.report.captions_cut,
    )
