"""Lookup of the committed shard that holds a key, for rejecting duplicate keys while writing.

A key belongs in one shard. A writer rejects keys of shards that were committed when it opened its
first one, of those it has committed since, and of committed shards of the input it is processing
(`00000` and `00000-retry1`), the most likely duplicates between concurrent processes. It does not
read other shards that are committed meanwhile, since every process would then parse all records. If
a key ends up in two shards that way, neither is readable: everything that loads the records of both
(every reader that opens the store, `write_index`, `verify`, `copy`, `drop` and `merge`) refuses and
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
from cache_schema.storage import LocalStorage

_MAX_UNLISTED = 16
_MAX_UNLISTED_SHARE = 1 / 20
"""Committed shards that `index.npz` may lack before a writer adds them: an absolute number, and a
share of those it lists. Opening the store parses that many records. Rewriting the index after each
growth by a twentieth costs about twenty times as much as writing it once for all clips."""


class CommittedShards:
    """The committed shards of one store; methods raise `CorruptRecord` for a damaged record."""

    def __init__(self, layout: StoreLayout, settings: StoreSettings) -> None:
        """Touches no file."""
        self._layout = layout
        self._settings = settings
        self._keys: SortedText | None = None

    def refresh(self, shard: str) -> None:
        """Load everything that must be known before `shard` is written."""
        if self._keys is None:
            self._load(load_index(LocalStorage(self._layout.root), self._settings))
        for name in self._committed_retries(shard):
            if name not in self._shard_names and name not in self._added:
                self.add(read_commit(self._layout, self._settings, name))

    def add(self, record: CommitRecord) -> None:
        """Add a shard that was just committed."""
        self._added.add(record.shard)
        self._shard_of_added_key.update((clip.key, record.shard) for clip in record.clips)

    def shard_of(self, key: str) -> str | None:
        """The known committed shard that holds the clip; None if there is none."""
        if key in self._shard_of_added_key:
            return self._shard_of_added_key[key]
        assert self._keys is not None
        row = self._keys.find(key)
        return None if row is None else self._shard_names[int(self._shards[row])]

    def update_index(self) -> None:
        """Update `index.npz` if it lacks many shards, unless another process is doing so."""
        num_listed = num_listed_shards(self._layout.index)
        num_committed = len(LocalStorage(self._layout.root).list_folder(self._layout.commits.name))
        if num_committed - num_listed > max(_MAX_UNLISTED, _MAX_UNLISTED_SHARE * num_listed):
            lock = FileLock(self._layout.store_lock, wait=False, what=f"store {self._layout.root}")
            with suppress(ShardBusy), lock:
                self._load(write_index(self._layout, self._settings, lock))

    def _load(self, index: ClipIndex) -> None:
        """Keep the keys and shards of an index, and drop its other columns."""
        self._keys, self._shards = index.keys, index.columns["clips.shard"]
        self._shard_names = index.shard_names
        self._shard_of_added_key: dict[str, str] = {}
        self._added: set[str] = set()

    def _committed_retries(self, shard: str) -> Iterator[str]:
        """The committed shards among the original of `shard` and all retries of that."""
        original = without_retry(shard)
        retries = (f"{original}-retry{number}" for number in count(1))
        # Retries are numbered consecutively; only `shard` itself may be missing in between.
        numbered = takewhile(lambda name: name == shard or self._is_committed(name), retries)
        return (name for name in (original, *numbered) if self._is_committed(name))

    def _is_committed(self, shard: str) -> bool:
        return self._layout.commit(shard).exists()
