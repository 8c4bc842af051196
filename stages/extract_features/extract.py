"""Stage one from end to end: every kind over the dataset's shards; the pipeline calls it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_schema import JSON, StoreReader, StoreWriter
from stages.clips import ClipDataset, ClipsConfig, input_shard_name, open_dataset
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.extraction import Extraction, bucket_name
from stages.extract_features.make_extractions import device_named, make_extractions
from stages.extract_features.summary import ExtractSummary, KindSummary
from stages.extract_features.work.failure_manifest import FAILURES_FILE, failures_listed
from stages.extract_features.work.jobs import plan_jobs
from stages.extract_features.work.local_engine import EngineReport, LocalEngine
from stages.extract_features.work.ray_engine import RayEngine
from stages.extract_features.work.ray_worker import WorkerSetup
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
) -> ExtractSummary:
    """Write the stores of `config.kinds` for every shard of the dataset.

    One model after the other, so that one big model is loaded at a time; with `clips.buckets`, one
    size after the other, each into stores of its own, and every clip into those of one size. A
    finished shard is not
    opened again; an unfinished one goes on after the clips that are safely staged. A clip that
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

    Raises:
        ValueError: A setting does not fit, before any work is done: dataset, base model, SAM2
            checkpoint, device or Ray is missing or wrong.
        CacheError: A store was written from other data or is damaged.
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
    shards = {shard.name: shard for shard in dataset.shards}
    engine: RayEngine | LocalEngine
    if config.engine == "ray":
        setup = WorkerSetup(
            config=config,
            clips=clips,
            model=model,
            cache_root=cache_root.expanduser().resolve(),
            folder=Path.cwd(),
        )
        engine = RayEngine(setup, shards)
    else:
        engine = LocalEngine(shards, device_named(config.device, rank), rank, world_size)
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
            summaries = _fill(engine, dataset, extractions, stores, progress, retry_failed)
    return ExtractSummary(
        kinds=tuple(summaries), dataset=dataset.layout, failures=cache_root / FAILURES_FILE
    )


def _fill(
    engine: RayEngine | LocalEngine,
    dataset: ClipDataset,
    extractions: Sequence[Extraction],
    stores: Sequence[Mapping[Kind, StoreWriter]],
    progress: Progress,
    retry_failed: bool,
) -> list[KindSummary]:
    plans = [plan_jobs(dataset, writers, retry_failed=retry_failed) for writers in stores]
    summaries: list[KindSummary] = []
    for extraction, writers, jobs in zip(extractions, stores, plans, strict=True):
        started = time.perf_counter()
        report = EngineReport()
        if any(job.is_pending(writers) for job in jobs):
            report = engine.run(extraction, writers, jobs, progress)
        seconds = time.perf_counter() - started
        summaries += [
            _summary(kind, extraction, writer, dataset, report, seconds)
            for kind, writer in writers.items()
        ]
    return summaries


def _summary(
    kind: Kind,
    extraction: Extraction,
    writer: StoreWriter,
    dataset: ClipDataset,
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
    return KindSummary(
        kind=kind,
        bucket=bucket_name(extraction.size),
        store=writer.path,
        clips_written=written,
        clips_already_there=sum(facts.num_clips for facts in of_dataset.values()) - written,
        skipped=tuple(clip for clip in reader.skipped if clip.shard in of_dataset),
        busy_shards=report.busy,
        seconds=seconds,
        bytes=sum(facts.num_bytes for facts in of_dataset.values()),
        captions_cut=report.captions_cut,
    )
