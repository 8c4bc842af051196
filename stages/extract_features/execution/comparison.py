"""Comparison of stores with the dataset: clips that are present, missing, or from other sources.

A run compares some shards of the dataset at a time; a dry run compares all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cache_schema import SortedText, StoreReader
from cache_schema.maintenance.drop import DROPPED
from cache_schema.shown_text import first_few
from stages.clips import ClipDataset, InputShard
from stages.clips.fingerprints import NO_VIDEO, source_hashes, video_hashes
from stages.extract_features.config import Kind
from stages.extract_features.fingerprints import SOURCES, DatasetSources

_MAX_NAMED = 5
"""Maximum number of keys named in a message."""

# Legend: N clip of the compared shards, in ascending order of keys.


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreScope:
    """Clips of the stores to look up in the dataset, to find those that it no longer has."""

    covers: Callable[[str], bool]
    """Whether the clips of a store's shard, given by name, are looked up."""
    unread: Sequence[InputShard] = ()
    """Further shards of the dataset that may have the clips, besides the compared ones."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoreComparison:
    """Comparison of one store with shards of the dataset; masks are bool [N]."""

    held_N: np.ndarray
    """The store holds the clip, from any source."""
    changed_N: np.ndarray
    """The store holds the clip, extracted from another source than the dataset has."""
    other_video_N: np.ndarray
    """The store holds the clip from the same source, which now belongs to another video."""
    unreadable_N: np.ndarray
    """The store holds the clip, but its video cannot be read for the comparison."""
    failed_N: np.ndarray
    """The clip from this source was skipped, and `--retry-failed` may succeed."""
    dropped_N: np.ndarray
    """The clip was dropped permanently."""
    gone: SortedText
    """Looked-up clips of the store that the dataset lacks."""
    gone_skipped: frozenset[str]
    """Looked-up clips that the store has skipped and the dataset lacks."""


def compare_store(
    reader: StoreReader | None, kind: Kind, sources: DatasetSources, scope: StoreScope | None
) -> StoreComparison:
    """Join a store with shards of the dataset by key; reads only the store's index.

    Args:
        reader: The store; None if it does not exist yet.
        kind: Kind of the store.
        sources: Fingerprints of the shards.
        scope: Clips of the store to look up in the dataset; None for none.
    """
    of_dataset_N = sources.fingerprints[kind]
    if reader is None:
        return _nothing_held(len(of_dataset_N))
    rows_N = reader.keys.rows_of(sources.keys)
    held_N = rows_N >= 0
    of_store_N = np.full(len(rows_N), b"", of_dataset_N.dtype)
    of_store_N[held_N] = reader.fingerprints[rows_N[held_N]]
    same_source_N = source_hashes(of_store_N) == source_hashes(of_dataset_N)
    video_N = video_hashes(of_dataset_N)
    is_video_N = video_N != NO_VIDEO.encode("ascii")
    failed_N, dropped_N = _skipped(reader, sources, of_dataset_N)
    gone, gone_skipped = SortedText.from_utf8(()), frozenset[str]()
    if scope is not None:
        gone, gone_skipped = _gone(reader, rows_N[held_N], sources, scope)
    return StoreComparison(
        held_N=held_N,
        changed_N=held_N & ~same_source_N & is_video_N,
        other_video_N=held_N & same_source_N & is_video_N & (video_hashes(of_store_N) != video_N),
        unreadable_N=held_N & ~is_video_N,
        failed_N=failed_N & ~held_N,
        dropped_N=dropped_N & ~held_N,
        gone=gone,
        gone_skipped=gone_skipped,
    )


def _nothing_held(num_clips: int) -> StoreComparison:
    none_N = np.zeros(num_clips, bool)
    return StoreComparison(
        held_N=none_N,
        changed_N=none_N,
        other_video_N=none_N,
        unreadable_N=none_N,
        failed_N=none_N,
        dropped_N=none_N,
        gone=SortedText.from_utf8(()),
        gone_skipped=frozenset(),
    )


def _skipped(
    reader: StoreReader, sources: DatasetSources, of_dataset_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    failed_N, dropped_N = np.zeros((2, len(of_dataset_N)), bool)
    if not reader.skipped:
        return failed_N, dropped_N
    source_N = source_hashes(of_dataset_N)
    for row, key in enumerate(sources.keys):
        for clip in reader.skipped_by_key.get(key, ()):
            if clip.reason == DROPPED:
                dropped_N[row] = True
            elif clip.fingerprint.encode("ascii").startswith(source_N[row]):
                failed_N[row] = True
    return failed_N, dropped_N


def _gone(
    reader: StoreReader, held_rows: np.ndarray, sources: DatasetSources, scope: StoreScope
) -> tuple[SortedText, frozenset[str]]:
    """Return the held and the skipped clips that the dataset lacks."""
    in_scope = np.array([scope.covers(name) for name in reader.shards], bool)
    is_open = in_scope[reader.shard_numbers]
    is_open[held_rows] = False
    held = reader.keys.take(np.flatnonzero(is_open))
    skipped = {
        clip.key
        for clip in reader.skipped
        if clip.key not in sources.keys and scope.covers(clip.shard)
    }
    moved = _found(SortedText.from_strings(sorted({*held, *skipped})), scope.unread)
    if moved:
        held = SortedText.from_strings(key for key in held if key not in moved)
    return held, frozenset(skipped - moved)


def _found(keys: SortedText, shards: Iterable[InputShard]) -> set[str]:
    """Return the keys that the shards have; reads only shards that may have one."""
    found: set[str] = set()
    for shard in shards:
        if _may_be_in(shard, keys):
            found.update(record.key for record in shard.records() if record.key in keys)
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KindComparison:
    """Comparison of the stores of one kind, one per size, with the dataset."""

    kind: Kind
    stores: Sequence[StoreComparison]

    @property
    def settled_N(self) -> np.ndarray:
        """bool [N]: clips that the store of any size holds, has skipped, or has dropped."""
        return np.logical_or.reduce(
            [self.held_or_dropped_N, *(one.failed_N for one in self.stores)]
        )

    @property
    def held_or_dropped_N(self) -> np.ndarray:
        """bool [N]: clips that the store of any size holds or has dropped."""
        masks = ((one.held_N, one.dropped_N) for one in self.stores)
        return np.logical_or.reduce([mask for of_store in masks for mask in of_store])

    def wanted_N(
        self, size: int, *, retry_failed: bool = False, refresh_changed: bool = False
    ) -> np.ndarray:
        """bool [N]: clips that a run would add to the store of one size, if they have that size.

        Args:
            size: Index of the store.
            retry_failed: Include clips that the store has skipped.
            refresh_changed: Include clips extracted from another source.
        """
        wanted_N = ~self.settled_N
        if retry_failed:
            wanted_N |= self.retried_N(size)
        return wanted_N | self.changed_N if refresh_changed else wanted_N

    def retried_N(self, size: int) -> np.ndarray:
        """bool [N]: clips that `--retry-failed` retries for the store of one size."""
        return self.stores[size].failed_N & ~self.held_or_dropped_N

    @property
    def changed_N(self) -> np.ndarray:
        """bool [N]: clips that the store of any size holds from another source."""
        return np.logical_or.reduce([one.changed_N for one in self.stores])


@dataclass(kw_only=True, slots=True, eq=False)
class Comparison:
    """Comparison of all stores with shards of the dataset; `sources` is None if nothing was."""

    sources: DatasetSources | None = None
    kinds: dict[Kind, KindComparison] = field(default_factory=dict)

    @property
    def has_changes(self) -> bool:
        """Whether a store holds a clip from another source, or whose video has changed."""
        stores = (one for found in self.kinds.values() for one in found.stores)
        return any(one.changed_N.any() or one.other_video_N.any() for one in stores)

    def raise_if_changed(self) -> None:
        """Raise if stores hold clips from other sources than the dataset's.

        Raises:
            ValueError: There are such clips.
        """
        notes = []
        for kind, found in self.kinds.items():
            rows = np.flatnonzero(found.changed_N)
            if len(rows):
                assert self.sources is not None
                named = first_few([repr(self.sources.keys[int(row)]) for row in rows], _MAX_NAMED)
                notes.append(f"{kind} of {len(rows)} (another {SOURCES[kind]}): {named}")
        if notes:
            raise ValueError(
                "the cache holds clips that were extracted from other sources than the dataset's: "
                f"{'; '.join(notes)}. If the dataset was changed, extract-features "
                "--refresh-changed extracts these again and keeps the rest; another dataset needs "
                "another cache folder"
            )

    def notes(self, world_size: int = 1) -> list[str]:
        """Return human-readable notes on store contents that do not match the dataset.

        Args:
            world_size: Number of processes that share the shards finished before the run.
        """
        lines = []
        where = f" (in this process's share, one of {world_size})" if world_size > 1 else ""
        for kind, found in self.kinds.items():
            gone = sum(len(one.gone) for one in found.stores)
            if gone:
                keys = [key for one in found.stores for key in one.gone[:_MAX_NAMED]][:_MAX_NAMED]
                more = f" and {gone - len(keys)} more" if gone > len(keys) else ""
                lines.append(
                    f"{kind}: {gone} clips of the store are not in the dataset{where} "
                    f"({', '.join(map(repr, keys))}{more}); they are kept and trained on until "
                    "cache drop removes them or train.leave_out excludes them"
                )
            unreadable = np.logical_or.reduce([one.unreadable_N for one in found.stores])
            if unreadable.any():
                lines.append(
                    f"{kind}: the videos of {np.count_nonzero(unreadable)} clips cannot be read "
                    f"now{where}; what the store holds of them is kept unchecked"
                )
        return lines


Readers = Iterable[tuple[Kind, StoreReader | None]]
"""The stores of every kind and, within a kind, size; None if a store does not exist yet."""


def compare(
    readers: Readers, sources: DatasetSources, scope: StoreScope | None = None
) -> Comparison:
    """Compare every store with shards of the dataset."""
    kinds: dict[Kind, list[StoreComparison]] = defaultdict(list)
    for kind, reader in readers:
        kinds[kind].append(compare_store(reader, kind, sources, scope))
    return Comparison(
        sources=sources,
        kinds={kind: KindComparison(kind=kind, stores=found) for kind, found in kinds.items()},
    )


def raise_if_other_dataset(
    kind: Kind, readers: Sequence[StoreReader], dataset: ClipDataset
) -> None:
    """Raise if stores have a shard of the dataset's name but no clip in common with it.

    Keys of the dataset are read up to the first shard with a known clip.

    Args:
        kind: Kind of the stores.
        readers: One store per size.
        dataset: The dataset.

    Raises:
        ValueError: The stores hold clips, but none of the dataset's.
    """
    names = {name for reader in readers for name in reader.shards}
    if names.isdisjoint(dataset.by_name):
        return
    held = [key for reader in readers for key in reader.keys[:_MAX_NAMED]]
    likely_first = sorted(dataset.shards, key=lambda shard: shard.name not in names)
    if held and not any(has_clip_of(readers, shard) for shard in likely_first):
        raise ValueError(
            f"the cache holds {kind} of another dataset: its shards have the same names but none "
            f"of the dataset's clips; they hold {', '.join(map(repr, held[:_MAX_NAMED]))}; "
            "use another cache folder"
        )


def has_clip_of(readers: Iterable[StoreReader], shard: InputShard) -> bool:
    """Whether a store holds or has skipped a clip of a shard; reads keys, but no videos."""
    likely = [
        reader
        for reader in readers
        if _may_be_in(shard, reader.keys)
        or any(key.startswith(shard.key_prefix) for key in reader.skipped_by_key)
    ]
    if not likely:
        return False
    keys = SortedText.from_strings(sorted({record.key for record in shard.records()}))
    return any(
        (reader.keys.rows_of(keys) >= 0).any() or any(key in reader.skipped_by_key for key in keys)
        for reader in likely
    )


def _may_be_in(shard: InputShard, keys: SortedText) -> bool:
    """Whether any of the keys has the prefix of the shard's keys."""
    prefix = shard.key_prefix.encode("utf-8")
    return keys.position(prefix) < keys.position(prefix + b"\xff")  # 0xff never occurs in UTF-8
