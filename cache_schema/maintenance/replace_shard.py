"""Replacing commit records or whole shards, and changing fingerprints without touching values.

Until the commit record is replaced, by one rename, readers see the shard as it was.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import link
from pathlib import Path

from cache_schema.atomic_io import make_directories, naming, sync, sync_folders
from cache_schema.claim import ShardClaim
from cache_schema.clip_index import ClipIndex, load_index
from cache_schema.commit import commit_group, commit_record, safe_metadata
from cache_schema.errors import CorruptClip, LockLost
from cache_schema.names import StoreLayout, check_fingerprint
from cache_schema.records import (
    ClipEntry,
    CommitRecord,
    SkippedClip,
    mend_hint,
    read_manifest,
    read_sealed_commit,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalPlace
from cache_schema.writer import StoreWriter
from cache_schema.zarr_shard import chunk_path, create_group

Edit = Callable[[CommitRecord], CommitRecord]
"""Gives a record with fewer clips, other fingerprints or other skips, or as it is. Clips are those
of the record, in its order and with the same files."""


def edit_records(
    layout: StoreLayout,
    settings: StoreSettings,
    index: ClipIndex,
    shards: Iterable[str],
    edit: Edit,
) -> None:
    """Replace the records of shards; their groups stay, without the clips no longer listed.

    No file of another clip is touched. Each record is read, written and put into the index once,
    and one at a time is in memory. A process killed in here leaves of each shard the old record or
    the new one, and files that `sweep_store` removes.

    Args:
        layout: the store's.
        settings: the store's.
        index: as of now; not changed, the new one is written.
        shards: those to edit.
        edit: called with each record.

    Raises `ShardBusy`, or `LockLost` where another process took a shard over; those before it are
    done.
    """
    folders: set[Path] = set()

    def edited() -> Iterator[tuple[CommitRecord, int]]:
        for shard in shards:
            with ShardClaim(layout, shard) as claim:
                record, crc32c = read_sealed_commit(layout, settings, shard)
                new = edit(record)
                if new != record:
                    new = replace(new, generation=record.generation + 1)
                    crc32c = commit_record(claim, settings, new, replaced=crc32c)
                    kept = {clip.index for clip in new.clips}
                    with suppress(LockLost):  # whoever took the shard over sweeps
                        folders.update(claim.discard_files(_files_of(layout, record, but=kept)))
                    claim.sweep()
            yield new, crc32c

    try:
        newer = ClipIndex.from_records(edited(), settings.arrays)
    finally:
        for folder in sorted(folders):  # together: their changes wait for the disk once
            with suppress(FileNotFoundError):  # a repair has moved the group since
                sync(folder)
    StoreWriter(layout.root, settings).write_index(index.with_shards(newer))


def _files_of(layout: StoreLayout, record: CommitRecord, *, but: Container[int]) -> Iterator[Path]:
    """Of the clips of a shard, by index, all but some."""
    group = layout.group(record.shard, record.group)
    for clip in record.clips:
        if clip.index not in but:
            yield from (group / stored.path for stored in clip.arrays.values())


def keep_clips(
    claim: ShardClaim,
    settings: StoreSettings,
    record: CommitRecord,
    keep: Sequence[ClipEntry],
    skipped: Sequence[SkippedClip],
    *,
    crc32c: int,
    quarantine: Path,
) -> None:
    """Replace a shard by its next generation, with some of its clips.

    The new group shares the clips' files with the old one by hard links. A process killed in here
    leaves the old shard or the new one, and leftovers that `sweep_store` removes.

    Args:
        claim: the shard's.
        settings: the store's.
        record: the shard as it is committed now.
        keep: clips of `record`, in the order they shall have; their files are taken as they are.
        skipped: what the new record says is left out, all of it.
        crc32c: that the record opens with on disk.
        quarantine: folder of the store to move the old group into.

    Raises `CorruptClip` where a file of a clip to keep is missing, and `LockLost` where another
    process took the shard over; nothing has changed then.
    """
    layout, shard, group = claim.layout, record.shard, claim.group
    old, generation = layout.group(shard, record.group), record.generation + 1
    for leftover in (group, layout.group(shard, generation)):
        if leftover.exists():  # of a process that was killed
            claim.discard(leftover)
    with claim.guarded():
        group.mkdir()
    clips = tuple(_link(clip, index, old, claim, settings) for index, clip in enumerate(keep))
    create_group(group, settings, len(clips))
    files = safe_metadata(group, settings)
    sync_folders(group)
    generation = record.generation + 1
    new = CommitRecord(shard, generation, generation, record.source, clips, tuple(skipped), files)
    commit_group(claim, settings, group, new, replaced=crc32c)
    if old.exists():
        make_directories(quarantine)
        with suppress(LockLost), claim.guarded():  # whoever took the shard over sweeps
            old.rename(quarantine / old.name)
        sync(quarantine)
        sync(layout.shards)
    claim.sweep()


def _link(
    clip: ClipEntry,
    index: int,
    old: Path,
    claim: ShardClaim,
    settings: StoreSettings,
) -> ClipEntry:
    """Put a clip's files into the new group, as number `index`."""
    arrays = {}
    for name, stored in clip.arrays.items():
        path = chunk_path(name, settings.arrays[name], index)
        target = claim.group / path
        target.parent.mkdir(exist_ok=True)
        try:
            _share(old / stored.path, target)
        except FileNotFoundError as error:
            claim.check()
            raise CorruptClip(
                f"clip {clip.key!r} in shard {clip.shard!r} of {claim.layout.root} is damaged: "
                f"file {stored.path} cannot be found; {mend_hint(claim.layout.root)}"
            ) from error
        arrays[name] = replace(stored, path=path)
    return replace(clip, index=index, arrays=arrays)


def _share(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with naming(target):
            shutil.copyfile(source, target)
        sync(target)


def change_fingerprints(store: Path, fingerprints: Mapping[str, str]) -> int:
    """Write other fingerprints for clips of a store: their shards' records are replaced.

    The clips' files stay. A process killed in here has changed some shards; the same call again
    changes the others.

    Args:
        store: the store's folder.
        fingerprints: by key, of clips of the store; others are left as they are.

    Returns:
        How many clips were changed.

    Raises:
        ShardBusy, LockLost: another process is changing one of the shards. Those before it are
            done.
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from the store's records.
    """
    layout = StoreLayout(Path(store))
    settings = read_manifest(layout).settings
    index = load_index(LocalPlace(layout.root), settings)
    shards: dict[str, dict[str, str]] = defaultdict(dict)
    for key, fingerprint in fingerprints.items():
        row = index.keys.find(key)
        if row is not None:
            shards[index.place_of(row)[0]][key] = check_fingerprint(fingerprint)
    layout.staging.mkdir(exist_ok=True)
    num_changed = 0

    def edit(record: CommitRecord) -> CommitRecord:
        nonlocal num_changed
        wanted = shards[record.shard]
        clips = tuple(
            replace(clip, fingerprint=wanted[clip.key]) if clip.key in wanted else clip
            for clip in record.clips
        )
        num_changed += sum(new != old for new, old in zip(clips, record.clips, strict=True))
        return replace(record, clips=clips)

    edit_records(layout, settings, index, sorted(shards), edit)
    return num_changed
