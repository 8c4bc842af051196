"""Committing a staged group as a shard, and cleaning up after killed processes."""

from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from cache_schema.atomic_io import make_directories, sync, sync_upwards, write_atomic
from cache_schema.checksummed_json import HEAD_BYTES, crc32c_digits, crc32c_hex, encode_record
from cache_schema.claim import ShardClaim
from cache_schema.errors import CorruptRecord, LockLost, ShardBusy
from cache_schema.names import StoreLayout, parse_group_name
from cache_schema.records import CommitRecord, StoredFile, committed_shards, read_commit
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalStorage
from cache_schema.zarr_shard import metadata_paths


def sync_metadata(group: Path, settings: StoreSettings) -> dict[str, StoredFile]:
    """Sync the metadata that Zarr wrote in a group; returns sizes and checksums for the record."""
    files = {}
    for path in metadata_paths(settings):
        file = group / path
        sync(file)
        sync_upwards(file.parent, group)
        data = file.read_bytes()
        files[path] = StoredFile(len(data), crc32c_hex(data))
    return files


def commit_group(
    claim: ShardClaim,
    settings: StoreSettings,
    group: Path,
    record: CommitRecord,
    *,
    replaced: int | None,
) -> None:
    """Publish a complete, synced group: rename it, then write the commit record.

    Args:
        claim: the shard's claim.
        settings: the store's settings.
        group: folder of the group, inside the claim's folder.
        record: commit record of the group.
        replaced: the `crc32c` of the shard's record when the caller read it; None if there was no
            record.

    Raises `LockLost` if another writer took the shard over; nothing committed has changed then.
    """
    layout = claim.layout
    target = layout.group(record.shard, record.group)
    make_directories(layout.shards)
    make_directories(layout.commits)
    _check_unchanged(claim, replaced)
    if target.exists():
        raise _changed_error(claim, target)
    with claim.guarded():
        group.rename(target)
        sync(layout.shards)
        _write_record(claim, settings, record)


def commit_record(
    claim: ShardClaim, settings: StoreSettings, record: CommitRecord, *, replaced: int
) -> int:
    """Replace a shard's commit record by one of clips in the same group.

    Args and errors as in `commit_group`. Returns the `crc32c` of the new record.
    """
    _check_unchanged(claim, replaced)
    with claim.guarded():
        return _write_record(claim, settings, record)


def _check_unchanged(claim: ShardClaim, replaced: int | None) -> None:
    claim.check()
    committed = claim.layout.commit(claim.shard)
    found = None
    with suppress(FileNotFoundError):
        head = LocalStorage(committed.parent).read_range(committed.name, 0, HEAD_BYTES)
        found = crc32c_digits(head)
    if found != (None if replaced is None else b"%08x" % replaced):
        raise _changed_error(claim, committed)


def _changed_error(claim: ShardClaim, path: Path) -> LockLost:
    return LockLost(
        f"{path} was written by another process while this process held the lock "
        f"{claim.layout.lock(claim.shard)}; nothing committed was changed. Run the same "
        "command again"
    )


def _write_record(claim: ShardClaim, settings: StoreSettings, record: CommitRecord) -> int:
    data = encode_record(record.as_dict(settings.hash))
    path = claim.layout.commit(record.shard)
    write_atomic(path, data, temporary=claim.records / "commit.json")
    return int(crc32c_digits(data), 16)


def clean_up_store(layout: StoreLayout, settings: StoreSettings) -> None:
    """Remove staging, lock files and replaced groups of committed shards that have no writer."""
    staging = {path.name for path in layout.staging.iterdir()}
    generations = group_generations(layout)
    for shard in committed_shards(layout):
        replaced = len(generations[shard]) > 1
        if not replaced and shard not in staging and layout.lock(shard).name not in staging:
            continue
        try:
            with ShardClaim(layout, shard) as claim:
                if not layout.commit(shard).exists():
                    continue
                _remove_replaced(claim, settings, generations[shard])
                claim.clear()
        except (ShardBusy, LockLost):
            continue  # another process is changing it


def group_generations(layout: StoreLayout) -> defaultdict[str, list[int]]:
    """Sorted generations of every shard that has group folders, committed or not."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    if layout.shards.is_dir():
        for path in layout.shards.iterdir():
            if name := parse_group_name(path.name):
                found[name[0]].append(name[1])
    for generations in found.values():
        generations.sort()
    return found


def _remove_replaced(claim: ShardClaim, settings: StoreSettings, generations: list[int]) -> None:
    try:
        record = read_commit(claim.layout, settings, claim.shard)
    except CorruptRecord:
        return  # the shard's group is unknown; a repair handles this
    for generation in generations:
        group = claim.layout.group(claim.shard, generation)
        if generation != record.group and group.exists():
            claim.discard(group)
    if record.group != record.generation:
        listed = {stored.path for clip in record.clips for stored in clip.arrays.values()}
        group = claim.layout.group(claim.shard, record.group)
        files = {path.relative_to(group).as_posix() for path in group.glob("*/c.*")}
        for folder in claim.discard_files(group / path for path in sorted(files - listed)):
            sync(folder)
