"""Bringing a store of schema version 1 to version 2, in place; used by `cache migrate`.

Commit records are rewritten one by one, `store.json` last: a store of which only a part is done is
refused by every reader, and the same call goes on with it. Clips' files stay as they are.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.clip_index import write_index
from cache_schema.durable import write_whole
from cache_schema.errors import CorruptRecord, ShardBusy, StoreNotFound, UnknownSchemaVersion
from cache_schema.layout import StoreLayout
from cache_schema.lock import FileLock
from cache_schema.manifest import (
    CommitRecord,
    StoreManifest,
    commit_from_dict,
    committed_shards,
    manifest_from_dict,
    mend_hint,
)
from cache_schema.sealed_json import seal, unseal
from cache_schema.settings import StoreSettings

FROM_VERSION = 1


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What `migrate_store` did."""

    num_records: int
    """Records that were rewritten: the shards', and the store's own."""
    num_clips: int
    """Clips of the whole store."""


def migrate_store(store: Path) -> MigrationReport:
    """Bring a store to the schema version of this package; one that is there already is left.

    What a killed writer of the old version left in staging is removed: its clips are extracted
    again.

    Raises:
        StoreNotFound: the folder holds no store.
        ShardBusy: a writer is at work. What was done so far stays; readers refuse the store.
        CorruptRecord: a record is damaged. No record was changed.
        UnknownSchemaVersion: a record is newer than this package.
    """
    layout = StoreLayout(Path(store))
    if not layout.store_file.is_file():
        raise StoreNotFound(f"{layout.root} is not a feature store: it has no store.json")
    layout.staging.mkdir(exist_ok=True)
    with FileLock(layout.store_lock, wait=True, what=f"store {layout.root}"):
        manifest, is_old = _read_manifest(layout)
        shards = committed_shards(layout)
        old = [s for s in shards if _read_commit(layout, manifest.settings, s)[1]]
        if is_old or old:
            _refuse_writers(layout)
        if is_old:
            _sweep_staging(layout)
        for shard in old:
            _rewrite(layout, manifest.settings, shard)
        if committed_shards(layout) != shards:
            raise ShardBusy(
                f"a shard of {layout.root} was finished by another process meanwhile; stop the "
                "writers of the old version, and run this command again"
            )
        num_clips = sum(
            len(_read_commit(layout, manifest.settings, shard)[0].clips) for shard in shards
        )
        if is_old or old:
            write_index(layout, manifest.settings)
        if is_old:
            _write(layout, layout.store_file, seal(manifest.as_dict()))
    return MigrationReport(len(old) + is_old, num_clips)


def _read_manifest(layout: StoreLayout) -> tuple[StoreManifest, bool]:
    """`store.json` in today's form, and whether it is in the old one on disk."""
    path = layout.store_file
    try:
        found, is_old = _unseal(path.read_bytes(), path, layout)
    except CorruptRecord as error:
        raise CorruptRecord(f"{error}; {mend_hint(layout.root)}") from error
    if is_old:
        arrays = {name: {**spec, "compression": "none"} for name, spec in found["arrays"].items()}
        found = {**found, "arrays": arrays}
    return manifest_from_dict(found, where=str(path), store=layout.root), is_old


def _read_commit(
    layout: StoreLayout, settings: StoreSettings, shard: str
) -> tuple[CommitRecord, bool]:
    """A commit record in today's form, and whether it is in the old one on disk."""
    path = layout.commit(shard)
    try:
        found, is_old = _unseal(path.read_bytes(), path, layout)
        if is_old:
            found = {**found, "generation": 0}
        return commit_from_dict(found, settings, shard), is_old
    except (CorruptRecord, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptRecord(
            f"commit record {path} cannot be trusted ({error}); delete it and run this command "
            "again, then sam2vx-pipeline extract-features to make that shard again"
        ) from error


def _unseal(data: bytes, path: Path, layout: StoreLayout) -> tuple[Mapping[str, Any], bool]:
    try:
        return unseal(data, str(path), store=layout.root), False
    except UnknownSchemaVersion:
        if json.loads(data)["schema_version"] != FROM_VERSION:
            raise
    return unseal(data, str(path), store=layout.root, version=FROM_VERSION), True


def _refuse_writers(layout: StoreLayout) -> None:
    """`ShardBusy` if a shard is being written; lock files of dead writers are removed."""
    for path in sorted(layout.staging.glob("*.lock")):
        if path != layout.store_lock:
            with FileLock(path, wait=False, what=f"shard {path.stem!r} of {layout.root}"):
                pass


def _sweep_staging(layout: StoreLayout) -> None:
    for path in layout.staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != layout.store_lock:
            path.unlink()


def _rewrite(layout: StoreLayout, settings: StoreSettings, shard: str) -> None:
    what = f"shard {shard!r} of {layout.root}"
    with FileLock(layout.lock(shard), wait=False, what=what):
        record, _ = _read_commit(layout, settings, shard)
        _write(layout, layout.commit(shard), seal(record.as_dict(settings.hash)))


def _write(layout: StoreLayout, path: Path, data: bytes) -> None:
    write_whole(path, data, temporary=layout.staging / ".migrating")
