"""Comparing the cache with the dataset at the start of a run, and making it fit."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cache_schema import StoreReader, StoreWriter
from cache_schema.lock import FileLock
from cache_schema.upkeep.drop import REDO, drop_clips
from cache_schema.upkeep.rebind import change_fingerprints
from stages.clips import ClipDataset
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.fingerprints import SOURCES
from stages.extract_features.work.comparison import (
    Comparison,
    StoreComparison,
    compare,
)
from stages.extract_features.work.dataset_sources import DatasetSources, read_sources
from stages.progress import Progress


def compare_and_refresh(
    cache_root: Path,
    dataset: ClipDataset,
    config: ExtractConfig,
    stores: Sequence[Mapping[Kind, StoreWriter]],
    progress: Progress,
    *,
    refresh_changed: bool,
) -> Comparison:
    """Compare every store with the dataset, and refuse or take out what was made from another one.

    Processes of one run may do this at once. A process killed in here has taken out some clips,
    which are then lacking, and the next run makes them.

    Args:
        cache_root: Folder of the stores.
        dataset: The dataset.
        config: Which kinds, and what prompts are made from.
        stores: Of every extraction.
        progress: A bar while the dataset is read; lines.
        refresh_changed: Take out clips whose source has changed, so that the run makes them again.

    Raises:
        ValueError: A store is another dataset's; or clips were made from other sources, and
            `refresh_changed` is not set. Nothing has changed.
    """
    paths = [(kind, writer.path) for writers in stores for kind, writer in writers.items()]
    if not any(reader.shards for _, reader in _readers(paths)):
        return Comparison()
    # Outside the lock: it can take minutes, which processes beside this one need not wait for.
    sources = read_sources(dataset, config, progress)
    lock = cache_root / ".refresh.lock"
    with FileLock(lock, wait=True, what=f"comparing {cache_root} with its dataset"):
        found = compare(_readers(paths), sources)
        found.check(refresh_changed=refresh_changed)
        changes = 0
        left = {kind: iter(of_kind.stores) for kind, of_kind in found.kinds.items()}
        for kind, path in paths:
            store = next(left[kind])
            changes += _take_out(path, kind, store, sources, progress)
            changes += _rebind(path, kind, store, sources)
        return compare(_readers(paths), sources) if changes else found


def _readers(paths: Sequence[tuple[Kind, Path]]) -> Iterator[tuple[Kind, StoreReader]]:
    """One after the other: the index of a million clips takes over 100 MB."""
    return ((kind, StoreReader(path, kind=kind)) for kind, path in paths)


def _take_out(
    path: Path, kind: Kind, found: StoreComparison, sources: DatasetSources, progress: Progress
) -> int:
    keys = [sources.keys[int(row)] for row in np.flatnonzero(found.changed_N)]
    if keys:
        detail = f"made from another {SOURCES[kind]} than the dataset has now"
        drop_clips(path, keys, detail=detail, reason=REDO)
        progress.log(f"{kind}: {len(keys)} clips {detail} are taken out and made again")
    return len(keys)


def _rebind(path: Path, kind: Kind, found: StoreComparison, sources: DatasetSources) -> int:
    rows = np.flatnonzero(found.rebound_N)
    if not len(rows):
        return 0
    digits = sources.fingerprints[kind][rows].tolist()
    keys = (sources.keys[int(row)] for row in rows)
    return change_fingerprints(
        path, {key: one.decode("ascii") for key, one in zip(keys, digits, strict=True)}
    )
