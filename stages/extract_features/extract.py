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
from stages.extract_features.work.jobs import pending_jobs, plan_jobs
from stages.extract_features.work.local_engine import EngineReport, LocalEngine
from stages.extract_features.work.ray_engine import RayEngine
from stages.extract_features.work.ray_worker import WorkerSetup
from stages.extract_features.work.refresh import compare_and_refresh
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
    staged. Clips that have left the dataset stay in the store. A clip that cannot be used is
    recorded with its reason and skipped; `failures.jsonl` in the cache folder lists all of them
    afterwards, also when an error ended the run.

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
    summaries: list[KindSummary] = []
    for extraction, writers, plan in zip(extractions, stores, plans, strict=True):
        started = time.perf_counter()
        report = EngineReport()
        if pending_jobs(plan.jobs, writers):
            report = engine.run(extraction, writers, plan, progress)
        seconds = time.perf_counter() - started
        summaries += [
            _summary(kind, extraction, writer, dataset, comparison.sources, report, seconds)
            for kind, writer in writers.items()
        ]
    return summaries


def _summary(
    kind: Kind,
    extraction: Extraction,
    writer: StoreWriter,
    dataset: ClipDataset,
    sources: DatasetSources | None,
    report: EngineReport,
    seconds: float,
) -> KindSummary:
    """What the store holds of the dataset, whoever wrote it, and what this process did."""
    writer.write_index()
    reader = StoreReader(writer.path)
    of_dataset = {
        name: facts
        for name, facts in reader.shards.items()
        if input_shard_name(name, dataset) is not None
    }
    written = report.written[kind]
    if sources is None:
        held = sum(facts.num_clips for facts in of_dataset.values())
    else:
        held = int(np.count_nonzero(reader.keys.rows_of(sources.keys) >= 0))
    return KindSummary(
        kind=kind,
        bucket=bucket_name(extraction.size),
        store=writer.path,
        clips_written=written,
        clips_already_there=held - written,
        skipped=tuple(
            clip
            for clip in reader.skipped
            if (clip.shard in of_dataset if sources is None else clip.key in sources.keys)
        ),
        busy_shards=report.busy,
        seconds=seconds,
        bytes=sum(facts.num_bytes for facts in of_dataset.values()),
        captions_cut=report.captions_cut,
    )
