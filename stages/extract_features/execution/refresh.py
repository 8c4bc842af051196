"""Comparison of the cache with shards of the dataset, and removal of outdated clips."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cache_schema import StoreReader, StoreWriter
from cache_schema.atomic_io import FileLock
from cache_schema.maintenance.drop import REDO, change_fingerprints, drop_clips
from cache_schema.names import without_retry
from stages.clips import ClipDataset, InputShard
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.execution.comparison import (
    Comparison,
    StoreComparison,
    StoreScope,
    compare,
    raise_if_other_dataset,
)
from stages.extract_features.execution.jobs import rank_order
from stages.extract_features.fingerprints import SOURCES, DatasetSources, read_sources
from stages.progress import Progress, SilentProgress

_CLIPS_COMPARED_FIRST = 64
"""Clips compared before any work: on network storage each takes several round trips."""


def compare_one_shard(
    dataset: ClipDataset,
    config: ExtractConfig,
    stores: Sequence[tuple[Kind, StoreWriter]],
    *,
    rank: int,
    world_size: int,
) -> set[str]:
    """Compare the first clips of the first finished shard of each kind, before any work.

    Reads the commit records of this shard only, and the index of a store that has none of the
    clips. A cache of another dataset is thus rejected before any work.

    Args:
        dataset: The dataset.
        config: Kinds to extract and sources of prompts.
        stores: Stores of every kind and size.
        rank: Rank of this process; shards of its own share come first.
        world_size: Number of processes.

    Returns:
        The compared shards for which a store has a clip from another source.

    Raises:
        ValueError: A store belongs to another dataset.
    """
    by_kind: dict[Kind, list[StoreWriter]] = defaultdict(list)
    for kind, writer in stores:
        by_kind[kind].append(writer)
    shards = rank_order(dataset.shards, rank, world_size)
    sources: dict[str, DatasetSources] = {}
    changed_shards = set[str]()
    for kind, writers in by_kind.items():
        finished = [writer.committed() for writer in writers]
        shard = next((one for one in shards if any(one.name in names for names in finished)), None)
        if shard is None:
            continue
        if shard.name not in sources:
            sources[shard.name] = read_sources(
                [shard],
                config.kinds,
                config.teacher,
                SilentProgress(),
                max_clips=_CLIPS_COMPARED_FIRST,
            )
        readers = [
            StoreReader(
                writer.path, shards=[name for name in names if without_retry(name) == shard.name]
            )
            for writer, names in zip(writers, finished, strict=True)
        ]
        found = compare(((kind, reader) for reader in readers), sources[shard.name])
        if not found.kinds[kind].settled_N.any():
            raise_if_other_dataset(kind, [StoreReader(one.path) for one in writers], dataset)
        if found.has_changes:
            changed_shards.add(shard.name)
    return changed_shards


def compare_and_refresh(
    cache_root: Path,
    shards: Sequence[InputShard],
    config: ExtractConfig,
    stores: Sequence[tuple[Kind, StoreWriter]],
    scope: StoreScope,
    progress: Progress,
    *,
    refresh_changed: bool,
) -> Comparison:
    """Compare every store with shards of the dataset; drop clips from other sources, or raise.

    Processes of one run may call this concurrently. If a process is killed here, the clips that it
    has dropped are missing, and the next run extracts them.

    Args:
        cache_root: Folder of the stores.
        shards: Shards of the dataset.
        config: Kinds to extract and sources of prompts.
        stores: Stores of every kind and size.
        scope: Clips of the stores to look up in the dataset.
        progress: Shows a bar while the shards are read, and log lines.
        refresh_changed: Drop clips whose source has changed, so that the run extracts them again.

    Raises:
        ValueError: Clips were extracted from other sources and `refresh_changed` is not set. The
            stores are not modified.
    """
    sources = read_sources(shards, config.kinds, config.teacher, progress)
    found = compare(_readers(stores), sources, scope)
    if not refresh_changed:
        found.raise_if_changed()
    if not found.has_changes:
        return found
    lock = cache_root / ".refresh.lock"
    with FileLock(lock, wait=True, what=f"the cache {cache_root}"):
        found = compare(_readers(stores), sources)  # others may have dropped the same clips
        left = {kind: iter(of_kind.stores) for kind, of_kind in found.kinds.items()}
        for kind, writer in stores:
            store = next(left[kind])
            if refresh_changed:
                _drop_changed(writer.path, kind, store, sources, progress)
            _update_video_hashes(writer.path, kind, store, sources)
        return compare(_readers(stores), sources, scope)


def _readers(stores: Sequence[tuple[Kind, StoreWriter]]) -> Iterator[tuple[Kind, StoreReader]]:
    """Open one store at a time: the index of a million clips takes over 100 MB."""
    return ((kind, StoreReader(writer.path, kind=kind)) for kind, writer in stores)


def _drop_changed(
    path: Path, kind: Kind, found: StoreComparison, sources: DatasetSources, progress: Progress
) -> None:
    keys = [sources.keys[int(row)] for row in np.flatnonzero(found.changed_N)]
    if keys:
        detail = f"made from another {SOURCES[kind]} than the dataset has now"
        drop_clips(path, keys, detail=detail, reason=REDO)
        progress.log(f"{kind}: {len(keys)} clips {detail} are dropped and extracted again")


def _update_video_hashes(
    path: Path, kind: Kind, found: StoreComparison, sources: DatasetSources
) -> None:
    rows = np.flatnonzero(found.other_video_N)
    if len(rows):
        digits = sources.fingerprints[kind][rows].tolist()
        keys = (sources.keys[int(row)] for row in rows)
        change_fingerprints(
            path, {key: one.decode("ascii") for key, one in zip(keys, digits, strict=True)}
        )
