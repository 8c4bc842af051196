"""Which clips a store's finished shards hold, as far as a writer has to know; used by the writer.

A key belongs in one shard. A writer refuses those of shards that were finished when it took its
first one, of those that it has finished since, and of those of the input it is at, which are what
processes beside each other are most likely to make twice (`00000` and `00000-retry1`). What others
finish meanwhile it does not read: that would cost every process the parsing of all records. Should
a key come to stand in two shards so, nobody reads either: whoever has the records of both, which is
every reader that opens the store, `write_index`, `verify`, `copy`, `drop` and `merge`, refuses and
names the key and the shards. `repair` keeps one of the two.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import count, takewhile

from cache_schema.atomic_io import FileLock
from cache_schema.clip_index import ClipIndex, load_index, write_index
from cache_schema.errors import ShardBusy
from cache_schema.index_file import num_listed_shards
from cache_schema.names import StoreLayout, without_retry
from cache_schema.packed_strings import SortedText
from cache_schema.records import CommitRecord, read_commit
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalPlace

_MAX_UNLISTED = 16
_MAX_UNLISTED_SHARE = 1 / 20
"""Finished shards that `index.npz` may lack before a writer lists them, and their share in those
that it has. Whoever opens the store parses the records of so many, and writing the index whenever
it has grown by a twentieth costs some twenty times what one of all clips does."""


class KnownShards:
    """The finished shards of one store; every method raises `CorruptRecord` for a damaged one."""

    def __init__(self, layout: StoreLayout, settings: StoreSettings) -> None:
        """Touches no file."""
        self._layout = layout
        self._settings = settings
        self._keys: SortedText | None = None

    def refresh(self, shard: str) -> None:
        """Take in what is to be known before `shard` is written."""
        if self._keys is None:
            self._take_in(load_index(LocalPlace(self._layout.root), self._settings))
        for name in self._of_one_input(shard):
            if name not in self._shard_names and name not in self._newer:
                self.add(read_commit(self._layout, self._settings, name))

    def add(self, record: CommitRecord) -> None:
        """Take in a shard that was just finished."""
        self._newer.add(record.shard)
        self._shard_of_newer.update((clip.key, record.shard) for clip in record.clips)

    def shard_of(self, key: str) -> str | None:
        """The finished shard that holds the clip, of those that are known; None if none does."""
        if key in self._shard_of_newer:
            return self._shard_of_newer[key]
        assert self._keys is not None
        row = self._keys.find(key)
        return None if row is None else self._shard_names[int(self._shards[row])]

    def keep_index(self) -> None:
        """Write `index.npz` if it lacks many finished shards, unless another process is at it."""
        listed = num_listed_shards(self._layout.index)
        finished = len(LocalPlace(self._layout.root).list_folder(self._layout.commits.name))
        if finished - listed > max(_MAX_UNLISTED, _MAX_UNLISTED_SHARE * listed):
            lock = FileLock(self._layout.store_lock, wait=False, what=f"store {self._layout.root}")
            with suppress(ShardBusy), lock:
                self._take_in(write_index(self._layout, self._settings, lock))

    def _take_in(self, index: ClipIndex) -> None:
        """Know all clips of an index; of its columns no more is kept."""
        self._keys, self._shards = index.keys, index.columns["clips.shard"]
        self._shard_names = index.shard_names
        self._shard_of_newer: dict[str, str] = {}
        self._newer: set[str] = set()

    def _of_one_input(self, shard: str) -> Iterator[str]:
        """The finished ones among a shard, the one it is a retry of, and all retries of that."""
        first = without_retry(shard)
        retries = (f"{first}-retry{number}" for number in count(1))
        # One that is missing is the last but for the shard's own, which is not finished.
        numbered = takewhile(lambda name: name == shard or self._is_finished(name), retries)
        return (name for name in (first, *numbered) if self._is_finished(name))

    def _is_finished(self, shard: str) -> bool:
        return self._layout.commit(shard).exists()
