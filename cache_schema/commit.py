"""Turning a staged group into a finished shard, and cleaning up what killed processes left."""

from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from cache_schema.atomic_io import make_directories, sync, sync_upwards, write_whole
from cache_schema.checksummed_json import HEAD_BYTES, crc32c_hex, opening_crc32c, seal
from cache_schema.claim import ShardClaim
from cache_schema.errors import CorruptRecord, LockLost, ShardBusy
from cache_schema.names import StoreLayout, parse_group_name
from cache_schema.records import CommitRecord, StoredFile, committed_shards, read_commit
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalPlace
from cache_schema.zarr_shard import metadata_paths


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
    claim: ShardClaim,
    settings: StoreSettings,
    group: Path,
    record: CommitRecord,
    *,
    replaced: int | None,
) -> None:
    """Publish a complete, synced group: one rename, then the commit record that readers trust.

    Args:
        claim: the shard's.
        settings: the store's.
        group: lies in the claim's folder.
        record: of the group.
        replaced: the checksum that the shard's record opened with when the caller read it; None
            where there was no record.

    Raises `LockLost` if another writer took the shard over; nothing committed has changed then.
    """
    layout = claim.layout
    target = layout.group(record.shard, record.group)
    make_directories(layout.shards)
    make_directories(layout.commits)
    _refuse_changed(claim, replaced)
    if target.exists():
        raise _changed(claim, target)
    with claim.guarded():
        group.rename(target)
        sync(layout.shards)
        _write_record(claim, settings, record)


def commit_record(
    claim: ShardClaim, settings: StoreSettings, record: CommitRecord, *, replaced: int
) -> int:
    """Replace a shard's commit record by one of clips in the same group.

    Args and errors are those of `commit_group`. Returns the checksum that the new record opens
    with.
    """
    _refuse_changed(claim, replaced)
    with claim.guarded():
        return _write_record(claim, settings, record)


def _refuse_changed(claim: ShardClaim, replaced: int | None) -> None:
    claim.check()
    committed = claim.layout.commit(claim.shard)
    found = None
    with suppress(FileNotFoundError):
        head = LocalPlace(committed.parent).read_range(committed.name, 0, HEAD_BYTES)
        found = opening_crc32c(head)
    if found != (None if replaced is None else b"%08x" % replaced):
        raise _changed(claim, committed)


def _changed(claim: ShardClaim, path: Path) -> LockLost:
    return LockLost(
        f"{path} was written by another process while this one held the lock "
        f"{claim.layout.lock(claim.shard)}; nothing committed was changed, run the same command "
        "again"
    )


def _write_record(claim: ShardClaim, settings: StoreSettings, record: CommitRecord) -> int:
    data = seal(record.as_dict(settings.hash))
    path = claim.layout.commit(record.shard)
    write_whole(path, data, temporary=claim.records / "commit.json")
    return int(opening_crc32c(data), 16)


def sweep_store(layout: StoreLayout, settings: StoreSettings) -> None:
    """Remove staging, lock files and replaced groups of finished shards nobody is working on."""
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
                _sweep_replaced(claim, settings, generations[shard])
                claim.sweep()
        except (ShardBusy, LockLost):
            continue  # another process is at it


def group_generations(layout: StoreLayout) -> defaultdict[str, list[int]]:
    """The generations of every shard that have a folder, committed or not, sorted."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    if layout.shards.is_dir():
        for path in layout.shards.iterdir():
            if name := parse_group_name(path.name):
                found[name[0]].append(name[1])
    for generations in found.values():
        generations.sort()
    return found


def _sweep_replaced(claim: ShardClaim, settings: StoreSettings, generations: list[int]) -> None:
    try:
        record = read_commit(claim.layout, settings, claim.shard)
    except CorruptRecord:
        return  # which group is the shard's is not known; that is for a repair
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
