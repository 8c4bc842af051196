"""What the stores hold of the dataset as it is now: what is done, lacking, or made from another.

`extract-features` and its `--dry-run` share this.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cache_schema import StoreReader
from cache_schema.upkeep.drop import DROPPED
from stages.clips.fingerprints import NO_VIDEO, sources_half, video_half
from stages.extract_features.config import Kind
from stages.extract_features.fingerprints import SOURCES
from stages.extract_features.work.dataset_sources import DatasetSources

_NAMED = 5
"""Keys that a message names."""

# Legend: N clip of the dataset, in ascending order of keys.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoreComparison:
    """One store against the dataset; masks are bool [N]."""

    held_N: np.ndarray
    """The store holds the clip, from whatever source."""
    changed_N: np.ndarray
    """It does, and made it from another source than the dataset has."""
    rebound_N: np.ndarray
    """It does from the same source, which belongs to another video now."""
    unreadable_N: np.ndarray
    """It does, and the clip's video cannot be read now to compare."""
    failed_N: np.ndarray
    """The clip was skipped for a reason that `--retry-failed` may overcome, from this source."""
    dropped_N: np.ndarray
    """Somebody took it out for good."""
    has_shard_in_common: bool
    """A finished shard has the name of one of the dataset's."""
    num_gone: int
    """Clips of the store that the dataset lacks."""
    gone: tuple[str, ...]
    """Some of them."""


def compare_store(
    reader: StoreReader | None, kind: Kind, sources: DatasetSources
) -> StoreComparison:
    """Join a store with the dataset by key; reads the store's index alone.

    Args:
        reader: The store; None where there is none yet.
        kind: Of the store.
        sources: The dataset.
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
    is_gone = np.ones(len(reader), bool)
    is_gone[rows_N[held_N]] = False
    gone_rows = np.flatnonzero(is_gone)
    return StoreComparison(
        held_N=held_N,
        changed_N=held_N & ~same_source_N & is_video_N,
        rebound_N=held_N & same_source_N & is_video_N & (video_half(of_store_N) != video_N),
        unreadable_N=held_N & ~is_video_N,
        failed_N=failed_N & ~held_N,
        dropped_N=dropped_N & ~held_N,
        has_shard_in_common=any(name in reader.shards for name in sources.shard_names),
        num_gone=len(gone_rows),
        gone=tuple(reader.keys[int(row)] for row in gone_rows[:_NAMED]),
    )


def _nothing_held(num_clips: int) -> StoreComparison:
    none_N = np.zeros(num_clips, bool)
    return StoreComparison(
        held_N=none_N,
        changed_N=none_N,
        rebound_N=none_N,
        unreadable_N=none_N,
        failed_N=none_N,
        dropped_N=none_N,
        has_shard_in_common=False,
        num_gone=0,
        gone=(),
    )


def _skipped(
    reader: StoreReader, sources: DatasetSources, of_dataset_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    failed_N, dropped_N = np.zeros((2, len(of_dataset_N)), bool)
    source_N = sources_half(of_dataset_N)
    for clip in reader.skipped:
        row = sources.keys.find(clip.key)
        if row is None:
            continue
        if clip.reason == DROPPED:
            dropped_N[row] = True
        elif clip.fingerprint.encode("ascii").startswith(source_N[row]):
            failed_N[row] = True
    return failed_N, dropped_N


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KindComparison:
    """The stores of one kind, one for every size, against the dataset."""

    kind: Kind
    stores: Sequence[StoreComparison]

    @property
    def settled_N(self) -> np.ndarray:
        """bool [N], the clips that some size's store holds, has skipped, or has dropped."""
        return np.logical_or.reduce([self.taken_N, *(one.failed_N for one in self.stores)])

    @property
    def taken_N(self) -> np.ndarray:
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
        return self.stores[size].failed_N & ~self.taken_N

    @property
    def is_another_dataset(self) -> bool:
        """Whether shards have the dataset's names, and no clip is the dataset's."""
        return (
            any(one.has_shard_in_common and one.num_gone for one in self.stores)
            and not self.settled_N.any()
        )

    @property
    def changed_N(self) -> np.ndarray:
        """bool [N], the clips that some size's store made from another source."""
        return np.logical_or.reduce([one.changed_N for one in self.stores])


@dataclass(kw_only=True, slots=True, eq=False)
class Comparison:
    """All stores of a run against the dataset; None of `sources` where the stores are empty."""

    sources: DatasetSources | None = None
    kinds: dict[Kind, KindComparison] = field(default_factory=dict)

    def check(self, *, refresh_changed: bool) -> None:
        """Refuse stores that were made from other sources than the dataset's.

        Args:
            refresh_changed: The clips concerned are to be made again.

        Raises:
            ValueError: A store has no clip in common with the dataset, but a shard; or clips were
                made from other sources and are not to be made again.
        """
        self._refuse_another()
        if not refresh_changed:
            self._refuse_changed()

    def _refuse_another(self) -> None:
        for kind, found in self.kinds.items():
            if found.is_another_dataset:
                named = ", ".join(repr(key) for one in found.stores for key in one.gone)
                raise ValueError(
                    f"the cache holds {kind} of another dataset: shards of the same names, and "
                    f"none of the dataset's clips, but {named}; use another cache folder"
                )

    def _refuse_changed(self) -> None:
        told = []
        for kind, found in self.kinds.items():
            rows = np.flatnonzero(found.changed_N)
            if len(rows):
                assert self.sources is not None
                named = ", ".join(repr(self.sources.keys[int(row)]) for row in rows[:_NAMED])
                more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
                told.append(f"{kind} of {len(rows)} (another {SOURCES[kind]}): {named}{more}")
        if told:
            raise ValueError(
                "the cache holds clips that were made from other sources than the dataset's: "
                f"{'; '.join(told)}. If the dataset was changed, extract-features "
                "--refresh-changed makes these again and leaves the rest; another dataset needs "
                "another cache folder"
            )

    def told(self) -> list[str]:
        """For people: what of the stores the dataset does not account for."""
        lines = []
        for kind, found in self.kinds.items():
            gone = sum(one.num_gone for one in found.stores)
            if gone:
                keys = [key for one in found.stores for key in one.gone][:_NAMED]
                more = f" and {gone - len(keys)} more" if gone > len(keys) else ""
                lines.append(
                    f"{kind}: {gone} clips of the store are not in the dataset "
                    f"({', '.join(map(repr, keys))}{more}); they are kept and trained on until "
                    "cache drop takes them out or train.leave_out names them"
                )
            unreadable = np.logical_or.reduce([one.unreadable_N for one in found.stores])
            if unreadable.any():
                lines.append(
                    f"{kind}: the videos of {np.count_nonzero(unreadable)} clips cannot be read "
                    "now; what the store holds of them is kept unchecked"
                )
        return lines


Readers = Iterable[tuple[Kind, StoreReader | None]]
"""The stores of every kind and, within a kind, size; None where there is none yet."""


def compare(readers: Readers, sources: DatasetSources) -> Comparison:
    """Every store against the dataset."""
    kinds: dict[Kind, list[StoreComparison]] = defaultdict(list)
    for kind, reader in readers:
        kinds[kind].append(compare_store(reader, kind, sources))
    return Comparison(
        sources=sources,
        kinds={kind: KindComparison(kind=kind, stores=found) for kind, found in kinds.items()},
    )
