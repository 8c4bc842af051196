"""Replacing a finished shard's record, or the whole shard; used by `drop`, `rebind` and `repair`.

Until the commit record is replaced, by one rename, readers see the shard as it was.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from os import link
from pathlib import Path

from cache_schema.claim import ShardClaim
from cache_schema.committing import commit_group, commit_record, safe_metadata
from cache_schema.durable import make_directories, sync, sync_folders
from cache_schema.errors import CorruptClip, LockLost
from cache_schema.manifest import ClipEntry, CommitRecord, SkippedClip, mend_hint
from cache_schema.settings import StoreSettings
from cache_schema.zarr_group import chunk_path, create_group


def replace_record(
    claim: ShardClaim,
    settings: StoreSettings,
    record: CommitRecord,
    clips: Sequence[ClipEntry],
    skipped: Sequence[SkippedClip],
) -> None:
    """Replace a shard's record; its group stays, without the clips that are no longer listed.

    No file of another clip is touched. A process killed in here leaves the old record or the new
    one, and files that `sweep_store` removes.

    Args:
        claim: the shard's.
        settings: the store's.
        record: the shard as it is committed now.
        clips: clips of `record`, in its order and with the same files.
        skipped: what the new record says is left out, all of it.

    Raises `LockLost` where another process took the shard over; nothing has changed then.
    """
    generation = record.generation + 1
    new = replace(record, generation=generation, clips=tuple(clips), skipped=tuple(skipped))
    commit_record(claim, settings, new, replaced=record)
    kept, group = {clip.index for clip in clips}, claim.layout.group(record.shard, record.group)
    gone = (clip.arrays.values() for clip in record.clips if clip.index not in kept)
    with suppress(LockLost):  # whoever took the shard over sweeps
        claim.discard_files(group / stored.path for arrays in gone for stored in arrays)
    claim.sweep()


def keep_clips(
    claim: ShardClaim,
    settings: StoreSettings,
    record: CommitRecord,
    keep: Sequence[ClipEntry],
    skipped: Sequence[SkippedClip],
    *,
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
    commit_group(claim, settings, group, new, replaced=record)
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
        shutil.copyfile(source, target)
        sync(target)
