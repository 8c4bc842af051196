"""Opening a store for writing: one writer per process, one process per shard."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_schema.atomic_io import FileLock, is_locked, make_directories, sync, write_atomic
from cache_schema.attribute_building import lists_all_shards, write_attributes
from cache_schema.checksummed_json import encode_record, plain_mapping
from cache_schema.commit import CommittedShards, clean_up_store
from cache_schema.errors import SettingsMismatch
from cache_schema.index import ClipIndex, is_indexed, write_index
from cache_schema.names import StoreLayout, check_shard_name
from cache_schema.records import StoreManifest, committed_shards, read_manifest
from cache_schema.schema import Compression, StoreSettings, differing_settings
from cache_schema.shard_writer import IsCurrent, ShardWriter
from cache_schema.storage import refuse_links
from cache_schema.zarr_shard import found_compression


class StoreWriter:
    """A store opened for writing with `open`; creates the `ShardWriter` of each shard."""

    def __init__(self, path: Path, settings: StoreSettings) -> None:
        """Use `open` instead; the store must exist."""
        self.path = path
        self.settings = settings
        self._layout = StoreLayout(path)
        self._committed = CommittedShards(self._layout, settings)

    @classmethod
    def open(
        cls, cache_root: Path, settings: StoreSettings, *, provenance: Mapping[str, Any]
    ) -> "StoreWriter":
        """Create the store with these settings under `cache_root`, or reopen it.

        Args:
            cache_root: folder of all stores; created if missing.
            settings: everything that affects values; determines the store's name. An existing store
                keeps its own compression.
            provenance: JSON facts about the run; kept from the run that created the store.

        Raises:
            UnknownSchemaVersion: the store exists with another schema version.
            SettingsMismatch: the folder of that name holds other settings.
            CorruptRecord: its `store.json` is damaged.
            SymlinkInStore: it contains a symbolic link among its own files.
        """
        plain_provenance = plain_mapping(provenance, "provenance")
        layout = StoreLayout(Path(cache_root) / settings.folder_name)
        refuse_links(layout)
        make_directories(layout.staging)
        with FileLock(layout.store_lock, wait=True, what=f"store {layout.root}"):
            if not layout.store_file.exists():
                manifest = StoreManifest(_as_stored(layout, settings), plain_provenance)
                write_atomic(
                    layout.store_file,
                    encode_record(manifest.as_dict()),
                    temporary=layout.staging / ".store.json",
                )
                sync(layout.root.parent)
        found = read_manifest(layout).settings
        if found.hash != settings.hash:
            raise SettingsMismatch(
                f"{layout.root} was made with other settings "
                f"({', '.join(differing_settings(found, settings))}); move it away, or set another "
                "cache folder"
            )
        make_directories(layout.shards)
        make_directories(layout.commits)
        clean_up_store(layout, found)
        return cls(layout.root, found)

    def is_committed(self, shard: str) -> bool:
        """Whether the shard is committed."""
        return self._layout.commit(check_shard_name(shard)).exists()

    def committed(self) -> frozenset[str]:
        """Names of all committed shards, from one directory listing."""
        return frozenset(committed_shards(self._layout))

    def is_busy(self, shard: str) -> bool:
        """Whether a process is writing the shard now."""
        return is_locked(self._layout.lock(check_shard_name(shard)))

    def shard(self, name: str, *, source: str, is_current: IsCurrent | None = None) -> ShardWriter:
        """A writer for one shard, to be used in a `with` block.

        Args:
            name: names the shard's files; `ValueError` if it is not safe for that.
            source: the input that the shard is made from.
            is_current: called with key and fingerprint of each clip that a killed writer has
                staged; the clips before the first that it rejects are adopted. If None, clips with
                the same source are adopted.
        """
        return ShardWriter(self._layout, self.settings, name, source, self._committed, is_current)

    def write_index(self, known: ClipIndex | None = None) -> None:
        """Update `index.npz` from the commit records, so that readers open large stores faster.

        Records that `known` contains are not read again. A store behind a URL is read by its index
        alone, so the index must be written before copying. If several processes call this at once,
        one writes, and the others check what it wrote.

        Raises:
            CorruptRecord: a commit record is damaged or lost, or two shards hold the same key.
        """
        self._layout.staging.mkdir(exist_ok=True)
        while True:
            before = _version_of(self._layout.index)
            # Checked without the lock, which would make a thousand processes read it in turn.
            if known is None and is_indexed(self._layout, self.settings):
                break
            with FileLock(self._layout.store_lock, wait=True, what=f"store {self.path}") as lock:
                if known is not None or _version_of(self._layout.index) == before:
                    write_index(self._layout, self.settings, lock, known)
                    break
        if self._layout.attributes.exists():  # so that it does not keep what was dropped
            self.write_attributes()

    def write_attributes(self) -> None:
        """Write `attributes.npz`, or update it, from the commit records; readers' lists use it.

        Raises `CorruptRecord` for a damaged commit record.
        """
        self._layout.staging.mkdir(exist_ok=True)
        # Checked without the lock first, as for the index.
        if lists_all_shards(self._layout, self.settings):
            return
        with FileLock(self._layout.store_lock, wait=True, what=f"store {self.path}") as lock:
            if not lists_all_shards(self._layout, self.settings):
                write_attributes(self._layout, self.settings, lock)


def _version_of(path: Path) -> tuple[int, int] | None:
    """Inode and modification time, which change when a file is replaced; None if missing."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _as_stored(layout: StoreLayout, settings: StoreSettings) -> StoreSettings:
    """The settings with the compression of existing groups, in case `store.json` was lost."""
    groups = sorted(layout.shards.iterdir()) if layout.shards.is_dir() else []
    arrays = {}
    for name, spec in settings.arrays.items():
        found = (found_compression(group, name) for group in groups)
        compression: Compression = next((c for c in found if c), spec.compression)
        arrays[name] = replace(spec, compression=compression)
    return replace(settings, arrays=arrays)
