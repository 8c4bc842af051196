"""How a staged group becomes a finished shard; used by `shard_writer` and by `upkeep`."""

import shutil
from pathlib import Path

from cache_schema.durable import make_directories, sync, sync_upwards, write_whole
from cache_schema.layout import StoreLayout
from cache_schema.manifest import CommitRecord, StoredFile
from cache_schema.sealed_json import crc32c_hex, seal
from cache_schema.settings import StoreSettings
from cache_schema.zarr_group import metadata_paths


def safe_metadata(group: Path, settings: StoreSettings) -> dict[str, StoredFile]:
    """Sync the metadata that Zarr wrote in a group; sizes and checksums, as a record lists them."""
    files = {}
    for path in metadata_paths(settings):
        file = group / path
        sync(file)
        sync_upwards(file.parent, group)
        data = file.read_bytes()
        files[path] = StoredFile(len(data), crc32c_hex(data))
    return files


def commit_group(
    layout: StoreLayout, settings: StoreSettings, group: Path, record: CommitRecord
) -> None:
    """Publish a complete, synced group: one rename, then the commit record that readers trust.

    The caller holds the shard's lock, and `group` lies in the shard's staging.
    """
    target = layout.group(record.shard, record.generation)
    make_directories(layout.shards)
    make_directories(layout.commits)
    if target.exists():  # by a process that was killed here; no record names it
        shutil.rmtree(target)
    group.rename(target)
    sync(layout.shards)
    write_whole(
        layout.commit(record.shard),
        seal(record.as_dict(settings.hash)),
        temporary=layout.staged(record.shard) / "commit.json",
    )
