"""Comparing the cache with the dataset at the start of a run, and making it fit."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    read_and_compare,
)
from stages.extract_features.work.dataset_sources import DatasetSources
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
    # Outside the lock: it can take minutes, which processes beside this one need not wait for.
    sources = read_and_compare(dataset, config, _readers(paths), progress).sources
    if sources is None:
        return Comparison()
    lock = cache_root / ".refresh.lock"
    with FileLock(lock, wait=True, what=f"comparing {cache_root} with its dataset"):
        readers = _readers(paths)
        found = compare(readers, sources)
        found.check(refresh_changed=refresh_changed)
        changes = 0
        for kind, of_kind in readers.items():
            for reader, store in zip(of_kind, found.kinds[kind].stores, strict=True):
                changes += _take_out(Path(reader.path), kind, store, sources, progress)
                changes += _rebind(Path(reader.path), kind, store, sources)
        return compare(_readers(paths), sources) if changes else found


def _readers(paths: Sequence[tuple[Kind, Path]]) -> dict[Kind, list[StoreReader]]:
    readers: dict[Kind, list[StoreReader]] = defaultdict(list)
    for kind, path in paths:
        readers[kind].append(StoreReader(path, kind=kind))
    return readers


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
