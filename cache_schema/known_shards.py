"""What is known of a store's finished shards, of as many as there are; used by the writer.

The index tells most of it, so that going on with a large store does not read every record. What
was committed since the index was loaded is read from its records.
"""

from functools import cached_property

from cache_schema.clip_index import ClipIndex, load_index
from cache_schema.layout import StoreLayout
from cache_schema.manifest import committed_shards, read_commit
from cache_schema.places import LocalPlace
from cache_schema.settings import StoreSettings


class KnownShards:
    """The finished shards of one store; every method raises `CorruptRecord` for a damaged one."""

    def __init__(self, layout: StoreLayout, settings: StoreSettings) -> None:
        """Touches no file."""
        self._layout = layout
        self._settings = settings
        self._shard_of_newer: dict[str, str] = {}
        self._newer: set[str] = set()

    @cached_property
    def _index(self) -> ClipIndex:
        """The store as it was when something was asked for the first time."""
        return load_index(LocalPlace(self._layout.root), self._settings)

    def refresh(self) -> None:
        """Take in the keys of shards that were committed since, by this process or another."""
        for shard in committed_shards(self._layout):
            if shard not in self._index.shards and shard not in self._newer:
                for clip in read_commit(self._layout, self._settings, shard).clips:
                    self._shard_of_newer[clip.key] = shard
                self._newer.add(shard)

    def shard_of(self, key: str) -> str | None:
        """The finished shard that holds the clip, as of the last `refresh`; None if none does."""
        if key in self._shard_of_newer:
            return self._shard_of_newer[key]
        row = self._index.keys.find(key)
        return None if row is None else self._index.place_of(row)[0]
