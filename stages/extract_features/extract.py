"""Stage one from end to end: every kind over this rank's shards; the pipeline calls it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema import JSON, ShardBusy, ShardWriter, StoreReader, StoreWriter
from stages.base_facts import BaseFacts, read_base_facts
from stages.base_model import resolve_base_model
from stages.clips import BadRecord, ClipsConfig, ClipSkipped, InputShard, open_dataset
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.extraction import Extracted, Extraction, release_memory
from stages.extract_features.latents import LatentsExtraction
from stages.extract_features.prefetch import prefetch
from stages.extract_features.summary import ExtractSummary, KindSummary
from stages.extract_features.teacher import TeacherExtraction
from stages.extract_features.text import TextExtraction
from stages.progress import Progress, Task

_BASE_PARTS: dict[Kind, tuple[str, ...]] = {
    "text": ("tokenizer", "text_encoder"),
    "latents": ("vae",),
    "teacher": (),
}
_BASE_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


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
) -> ExtractSummary:
    """Write the stores of `config.kinds` for every `world_size`-th shard of the dataset.

    One kind after the other, so that one big model is loaded at a time. A finished shard is not
    opened again; an unfinished one goes on after the clips that are safely staged. A clip that
    cannot be used is recorded with its reason and skipped.

    Args:
        config: What to compute, and where.
        clips: The dataset, and the size, length and rate of its clips.
        model: The base pipeline whose VAE and text encoder are used.
        cache_root: Folder of the stores; made when missing.
        provenance: Facts about the run, kept in stores that this run creates.
        progress: Bars and lines.
        rank: This process's number; it takes the shards rank, rank + world_size, ...
        world_size: Number of processes at work.

    Raises:
        ValueError: A setting does not fit, before any work is done: dataset, base model, SAM2
            checkpoint or device is missing or wrong.
        CacheError: A store was written from other data or is damaged.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world size {world_size}): {rank}")
    device = _device(config.device, rank)
    shards = open_dataset(clips).shards[rank::world_size]
    extractions = _extractions(config, clips, model)
    summaries = []
    for kind, extraction in extractions.items():
        writer = StoreWriter.open(cache_root, extraction.settings, provenance=provenance)
        summaries.append(_extract_kind(kind, extraction, writer, shards, device, progress))
        release_memory()
    return ExtractSummary(kinds=tuple(summaries))


def _extractions(
    config: ExtractConfig, clips: ClipsConfig, model: BaseModelConfig
) -> dict[Kind, Extraction]:
    """Everything that can be checked in advance is checked here."""
    made: dict[Kind, Extraction] = {}
    base: BaseFacts | None = None
    parts = [part for kind in config.kinds for part in _BASE_PARTS[kind]]
    if parts:
        base = read_base_facts(resolve_base_model(model, (*_BASE_CONFIGS, *parts)))
    for kind in config.kinds:
        if kind == "teacher":
            made[kind] = TeacherExtraction(config.teacher, clips)
            continue
        assert base is not None
        if kind == "latents":
            made[kind] = LatentsExtraction(config.latents, clips, base, seed=config.seed)
        else:
            made[kind] = TextExtraction(config.text, base)
    return made


def _extract_kind(
    kind: Kind,
    extraction: Extraction,
    writer: StoreWriter,
    shards: Sequence[InputShard],
    device: torch.device,
    progress: Progress,
) -> KindSummary:
    started = time.perf_counter()
    pending: list[InputShard] = []
    completed = 0
    for shard in shards:
        if writer.is_committed(shard.name, source=shard.source):
            completed += sum(writer.committed_counts(shard.name))
        else:
            pending.append(shard)
    written, busy = 0, []
    if pending:
        total = completed + sum(shard.num_clips() for shard in pending)
        with (
            progress.task(kind, total, completed=completed, unit="clips") as task,
            extraction.opened(device) as extract,
        ):
            for shard in pending:
                try:
                    written += _extract_shard(extraction, extract, writer, shard, task, progress)
                except ShardBusy as error:
                    busy.append(shard.name)
                    progress.log(f"{kind}: left alone, {error}")
    names = {shard.name for shard in shards}
    reader = StoreReader(writer.path)
    entries = [entry for entry in map(reader.record, reader.keys) if entry.shard in names]
    return KindSummary(
        kind=kind,
        store=writer.path,
        clips_written=written,
        clips_already_there=len(entries) - written,
        skipped=tuple(clip for clip in reader.skipped if clip.shard in names),
        busy_shards=tuple(busy),
        seconds=time.perf_counter() - started,
        bytes=sum(array.bytes for entry in entries for array in entry.arrays.values()),
    )


def _extract_shard(
    extraction: Extraction,
    extract: Callable[[Any], Extracted],
    writer: StoreWriter,
    shard: InputShard,
    task: Task,
    progress: Progress,
) -> int:
    """Write and commit one shard; returns how many clips this run added to it."""
    kind, written = writer.settings.kind, 0
    with (
        writer.shard(shard.name, source=shard.source) as out,
        closing(prefetch(_prepared_clips(extraction, shard, out))) as clips,
    ):
        for key, prepared in clips:
            try:
                if prepared is _STAGED:
                    continue
                if isinstance(prepared, ClipSkipped):
                    raise prepared
                extracted = extract(prepared)
                _check_finite(extracted)
                out.add(key, extracted.arrays, extracted.attributes)
                written += 1
            except ClipSkipped as skipped:
                out.skip(key, skipped.reason, skipped.detail)
                progress.log(f"{kind}: skipped {key}, {skipped.reason}: {skipped.detail}")
            except Exception as error:
                error.add_note(f"while extracting {kind} of clip {key!r} in {shard.source}")
                raise
            finally:
                task.advance()
        out.commit()
    return written


_STAGED = object()


def _prepared_clips(
    extraction: Extraction, shard: InputShard, out: ShardWriter
) -> Iterator[tuple[str, Any]]:
    """Key and prepared clip; or `_STAGED` for a clip already safe, or why it cannot be used."""
    for record in shard.records():
        if out.has(record.key):
            yield record.key, _STAGED
        elif isinstance(record, BadRecord):
            yield record.key, ClipSkipped(record.reason, record.detail)
        else:
            try:
                yield record.key, extraction.prepare(record)
            except ClipSkipped as skipped:
                yield record.key, skipped
            except Exception as error:
                error.add_note(f"while preparing clip {record.key!r} of {shard.source}")
                raise


def _check_finite(extracted: Extracted) -> None:
    for name, values in extracted.arrays.items():
        if not np.isfinite(values).all():
            raise ClipSkipped(
                "not_finite", f"{name} has NaN or values beyond float16; fp32 precision may help"
            )


def _device(name: str, rank: int) -> torch.device:
    """The device a rank works on.

    Raises:
        ValueError: No such device here.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"extract.device={name} is no torch device; auto is usual") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"extract.device={name}, but this machine has {gpus} CUDA devices")
    return device
