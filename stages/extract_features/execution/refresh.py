"""Comparing the cache with shards of the dataset, and making it fit."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cache_schema import StoreReader, StoreWriter
from cache_schema.atomic_io import FileLock
from cache_schema.maintenance.drop import REDO, drop_clips
from cache_schema.maintenance.replace_shard import change_fingerprints
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
from stages.extract_features.execution.dataset_sources import DatasetSources, read_sources
from stages.extract_features.execution.jobs import rank_order
from stages.extract_features.fingerprints import SOURCES
from stages.progress import Progress, SilentProgress

_CLIPS_COMPARED_FIRST = 64
"""Clips that are compared before any work: on network storage each costs several round trips."""


def compare_one_shard(
    dataset: ClipDataset,
    config: ExtractConfig,
    stores: Sequence[tuple[Kind, StoreWriter]],
    *,
    rank: int,
    world_size: int,
) -> set[str]:
    """Compare the first clips of the first finished shard of each kind, before any work.

    Only the commit records of this shard are read, and of a store that knows none of the clips the
    index: so a dataset that has nothing to do with the cache is refused before any work.

    Args:
        dataset: The dataset.
        config: Which kinds, and what prompts are made from.
        stores: Of every kind and size.
        rank: This process's number; it looks into its own share first.
        world_size: Number of processes at work.

    Returns:
        The shards, of those, of which a store has a clip from another source.

    Raises:
        ValueError: A store is another dataset's.
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
    share: StoreScope,
    progress: Progress,
    *,
    refresh_changed: bool,
) -> Comparison:
    """Compare every store with shards of the dataset, and refuse or take out what is from others.

    Processes of one run may do this at once. A process killed in here has taken out some clips,
    which are then lacking, and the next run makes them.

    Args:
        cache_root: Folder of the stores.
        shards: Of the dataset.
        config: Which kinds, and what prompts are made from.
        stores: Of every kind and size.
        share: The stores' clips that the dataset must have.
        progress: A bar while the shards are read; lines.
        refresh_changed: Take out clips whose source has changed, so that the run makes them again.

    Raises:
        ValueError: Clips were made from other sources, and `refresh_changed` is not set. Nothing
            has changed.
    """
    sources = read_sources(shards, config.kinds, config.teacher, progress)
    found = compare(_readers(stores), sources, share)
    if not refresh_changed:
        found.raise_if_changed()
    if not found.has_changes:
        return found
    lock = cache_root / ".refresh.lock"
    with FileLock(lock, wait=True, what=f"making {cache_root} fit its dataset"):
        found = compare(_readers(stores), sources)  # others may have taken out the same
        left = {kind: iter(of_kind.stores) for kind, of_kind in found.kinds.items()}
        for kind, writer in stores:
            store = next(left[kind])
            if refresh_changed:
                _drop_changed(writer.path, kind, store, sources, progress)
            _update_video_hashes(writer.path, kind, store, sources)
        return compare(_readers(stores), sources, share)


def _readers(stores: Sequence[tuple[Kind, StoreWriter]]) -> Iterator[tuple[Kind, StoreReader]]:
    """One after the other: the index of a million clips takes over 100 MB."""
    return ((kind, StoreReader(writer.path, kind=kind)) for kind, writer in stores)


def _drop_changed(
    path: Path, kind: Kind, found: StoreComparison, sources: DatasetSources, progress: Progress
) -> None:
    keys = [sources.keys[int(row)] for row in np.flatnonzero(found.changed_N)]
    if keys:
        detail = f"made from another {SOURCES[kind]} than the dataset has now"
        drop_clips(path, keys, detail=detail, reason=REDO)
        progress.log(f"{kind}: {len(keys)} clips {detail} are taken out and made again")


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
