"""Which finished shard a key is in, of as many clips as there are; used by the writer."""

from cache_schema.clip_index import ClipIndex, load_index
from cache_schema.layout import StoreLayout
from cache_schema.manifest import committed_shards, read_commit
from cache_schema.places import LocalPlace
from cache_schema.settings import StoreSettings


class CommittedKeys:
    """The keys of a store, brought up to date with the shards that others finish by `refresh`."""

    def __init__(self, layout: StoreLayout, settings: StoreSettings) -> None:
        """Touches no file; knows no key before `refresh`."""
        self._layout = layout
        self._settings = settings
        self._index: ClipIndex | None = None
        self._newer: dict[str, str] = {}
        self._shards: set[str] = set()

    def refresh(self) -> None:
        """Take in the shards that were committed since, by this process or another.

        Raises `CorruptRecord`.
        """
        if self._index is None:
            self._index = load_index(LocalPlace(self._layout.root), self._settings)
            self._shards.update(self._index.shard_names)
        for shard in committed_shards(self._layout):
            if shard not in self._shards:
                for clip in read_commit(self._layout, self._settings, shard).clips:
                    self._newer[clip.key] = shard
                self._shards.add(shard)

    def shard_of(self, key: str) -> str | None:
        """The finished shard that holds the clip, as of the last `refresh`; None if none does."""
        if key in self._newer or self._index is None:
            return self._newer.get(key)
        row = self._index.keys.find(key)
        return None if row is None else self._index.place_of(row)[0]
