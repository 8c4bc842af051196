"""What the stores hold of the dataset as it is now: what is done, lacking, or made from another.

`extract-features` and its `--dry-run` share this: a run compares some shards of the dataset at a
time, the dry run all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cache_schema import SortedText, StoreReader
from cache_schema.maintenance.drop import DROPPED
from stages.clips import ClipDataset, InputShard
from stages.clips.fingerprints import NO_VIDEO, sources_half, video_half
from stages.extract_features.config import Kind
from stages.extract_features.execution.dataset_sources import DatasetSources
from stages.extract_features.fingerprints import SOURCES

_MAX_NAMED = 5
"""Keys that a message names."""

# Legend: N clip of the shards that are compared, in ascending order of keys.


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreScope:
    """Which clips of the stores the dataset must have, or they have left it."""

    covers: Callable[[str], bool]
    """Whether the clips of a store's shard of this name are looked for."""
    unread: Sequence[InputShard] = ()
    """Of the dataset, where a clip can be beside the shards that are compared."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoreComparison:
    """One store against shards of the dataset; masks are bool [N]."""

    held_N: np.ndarray
    """The store holds the clip, from whatever source."""
    changed_N: np.ndarray
    """It does, and made it from another source than the dataset has."""
    other_video_N: np.ndarray
    """It does from the same source, which belongs to another video now."""
    unreadable_N: np.ndarray
    """It does, and the clip's video cannot be read now to compare."""
    failed_N: np.ndarray
    """The clip was skipped for a reason that `--retry-failed` may overcome, from this source."""
    dropped_N: np.ndarray
    """Somebody took it out for good."""
    gone: SortedText
    """Clips of the store that the dataset lacks, of those that were looked for."""
    gone_skipped: frozenset[str]
    """Clips that the store has skipped and the dataset lacks."""


def compare_store(
    reader: StoreReader | None, kind: Kind, sources: DatasetSources, share: StoreScope | None
) -> StoreComparison:
    """Join a store with shards of the dataset by key; reads the store's index alone.

    Args:
        reader: The store; None where there is none yet.
        kind: Of the store.
        sources: The shards.
        share: The store's clips that the dataset must have; None to look for none.
    """
    of_dataset_N = sources.fingerprints[kind]
    if reader is None:
        return _nothing_held(len(of_dataset_N))
    rows_N = reader.keys.rows_of(sources.keys)
    held_N = rows_N >= 0
    of_store_N = np.full(len(rows_N), b"", of_dataset_N.dtype)
    of_store_N[held_N] = reader.fingerprints[rows_N[held_N]]
    same_source_N = sources_half(of_store_N) == sources_half(of_dataset_N)
    video_N = video_half(of_dataset_N)
    is_video_N = video_N != NO_VIDEO.encode("ascii")
    failed_N, dropped_N = _skipped(reader, sources, of_dataset_N)
    gone, gone_skipped = SortedText.from_utf8(()), frozenset[str]()
    if share is not None:
        gone, gone_skipped = _gone(reader, rows_N[held_N], sources, share)
    return StoreComparison(
        held_N=held_N,
        changed_N=held_N & ~same_source_N & is_video_N,
        other_video_N=held_N & same_source_N & is_video_N & (video_half(of_store_N) != video_N),
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
    source_N = sources_half(of_dataset_N)
    for row, key in enumerate(sources.keys):
        for clip in reader.skipped_by_key.get(key, ()):
            if clip.reason == DROPPED:
                dropped_N[row] = True
            elif clip.fingerprint.encode("ascii").startswith(source_N[row]):
                failed_N[row] = True
    return failed_N, dropped_N


def _gone(
    reader: StoreReader, held_rows: np.ndarray, sources: DatasetSources, share: StoreScope
) -> tuple[SortedText, frozenset[str]]:
    """Clips held, and skipped ones, that the dataset has nowhere."""
    is_of_share = np.array([share.covers(name) for name in reader.shards], bool)
    is_open = is_of_share[reader.shard_numbers]
    is_open[held_rows] = False
    held = reader.keys.take(np.flatnonzero(is_open))
    skipped = {
        clip.key
        for clip in reader.skipped
        if clip.key not in sources.keys and share.covers(clip.shard)
    }
    moved = _found(SortedText.from_strings(sorted({*held, *skipped})), share.unread)
    if moved:
        held = SortedText.from_strings(key for key in held if key not in moved)
    return held, frozenset(skipped - moved)


def _found(keys: SortedText, shards: Iterable[InputShard]) -> set[str]:
    """Which of the keys the shards have; reads those alone that may have one."""
    found: set[str] = set()
    for shard in shards:
        if _may_be_in(shard, keys):
            found.update(record.key for record in shard.records() if record.key in keys)
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KindComparison:
    """The stores of one kind, one for every size, against the dataset."""

    kind: Kind
    stores: Sequence[StoreComparison]

    @property
    def settled_N(self) -> np.ndarray:
        """bool [N], the clips that some size's store holds, has skipped, or has dropped."""
        return np.logical_or.reduce(
            [self.held_or_dropped_N, *(one.failed_N for one in self.stores)]
        )

    @property
    def held_or_dropped_N(self) -> np.ndarray:
        """bool [N], the clips that some size's store holds, or somebody has dropped."""
        masks = ((one.held_N, one.dropped_N) for one in self.stores)
        return np.logical_or.reduce([mask for of_store in masks for mask in of_store])

    def wanted_N(
        self, size: int, *, retry_failed: bool = False, refresh_changed: bool = False
    ) -> np.ndarray:
        """bool [N], the clips that a run would put into the store of one size, if they fit it.

        Args:
            size: Which of the stores.
            retry_failed: Those too that the store has skipped.
            refresh_changed: Those too that were made from another source.
        """
        wanted_N = ~self.settled_N
        if retry_failed:
            wanted_N |= self.retried_N(size)
        return wanted_N | self.changed_N if refresh_changed else wanted_N

    def retried_N(self, size: int) -> np.ndarray:
        """bool [N], the clips of one size's store that `--retry-failed` takes again."""
        return self.stores[size].failed_N & ~self.held_or_dropped_N

    @property
    def changed_N(self) -> np.ndarray:
        """bool [N], the clips that some size's store made from another source."""
        return np.logical_or.reduce([one.changed_N for one in self.stores])


@dataclass(kw_only=True, slots=True, eq=False)
class Comparison:
    """Stores against shards of the dataset; None of `sources` where nothing was compared."""

    sources: DatasetSources | None = None
    kinds: dict[Kind, KindComparison] = field(default_factory=dict)

    @property
    def has_changes(self) -> bool:
        """Whether a store holds a clip from another source, or beside another video."""
        stores = (one for found in self.kinds.values() for one in found.stores)
        return any(one.changed_N.any() or one.other_video_N.any() for one in stores)

    def raise_if_changed(self) -> None:
        """Refuse clips that were made from other sources than the dataset's.

        Raises:
            ValueError: There are some.
        """
        notes = []
        for kind, found in self.kinds.items():
            rows = np.flatnonzero(found.changed_N)
            if len(rows):
                assert self.sources is not None
                named = ", ".join(repr(self.sources.keys[int(row)]) for row in rows[:_MAX_NAMED])
                more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
                notes.append(f"{kind} of {len(rows)} (another {SOURCES[kind]}): {named}{more}")
        if notes:
            raise ValueError(
                "the cache holds clips that were made from other sources than the dataset's: "
                f"{'; '.join(notes)}. If the dataset was changed, extract-features "
                "--refresh-changed makes these again and leaves the rest; another dataset needs "
                "another cache folder"
            )

    def notes(self, world_size: int = 1) -> list[str]:
        """For people: what of the stores the dataset does not account for.

        Args:
            world_size: How many processes have a share of the shards that were finished before.
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
                    "cache drop takes them out or train.leave_out names them"
                )
            unreadable = np.logical_or.reduce([one.unreadable_N for one in found.stores])
            if unreadable.any():
                lines.append(
                    f"{kind}: the videos of {np.count_nonzero(unreadable)} clips cannot be read "
                    f"now{where}; what the store holds of them is kept unchecked"
                )
        return lines


Readers = Iterable[tuple[Kind, StoreReader | None]]
"""The stores of every kind and, within a kind, size; None where there is none yet."""


def compare(
    readers: Readers, sources: DatasetSources, share: StoreScope | None = None
) -> Comparison:
    """Every store against shards of the dataset."""
    kinds: dict[Kind, list[StoreComparison]] = defaultdict(list)
    for kind, reader in readers:
        kinds[kind].append(compare_store(reader, kind, sources, share))
    return Comparison(
        sources=sources,
        kinds={kind: KindComparison(kind=kind, stores=found) for kind, found in kinds.items()},
    )


def raise_if_other_dataset(
    kind: Kind, readers: Sequence[StoreReader], dataset: ClipDataset
) -> None:
    """Refuse stores that have no clip in common with the dataset, but a shard of the same name.

    Names are read up to the first shard with a clip that a store knows.

    Args:
        kind: Of the stores.
        readers: One for every size.
        dataset: In shards.

    Raises:
        ValueError: The stores hold clips, and know none of the dataset's.
    """
    names = {name for reader in readers for name in reader.shards}
    if names.isdisjoint(dataset.by_name):
        return
    held = [key for reader in readers for key in reader.keys[:_MAX_NAMED]]
    likely_first = sorted(dataset.shards, key=lambda shard: shard.name not in names)
    if held and not any(has_clip_of(readers, shard) for shard in likely_first):
        raise ValueError(
            f"the cache holds {kind} of another dataset: shards of the same names, and none of the "
            f"dataset's clips, but {', '.join(map(repr, held[:_MAX_NAMED]))}; "
            "use another cache folder"
        )


def has_clip_of(readers: Iterable[StoreReader], shard: InputShard) -> bool:
    """Whether a store holds a clip of a shard, or has skipped one; reads names, and no video."""
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
    """Whether the beginning of a key allows that it is one of the shard's."""
    prefix = shard.key_prefix.encode("utf-8")
    return keys.position(prefix) < keys.position(prefix + b"\xff")  # which no text has
