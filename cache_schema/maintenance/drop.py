"""Changing committed shards: dropping clips, replacing records or groups, changing fingerprints.

Readers see the old shard until its commit record is replaced by a rename.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import link
from pathlib import Path
from typing import Literal

from cache_schema.atomic_io import add_path_to_errors, make_directories, sync, sync_folders
from cache_schema.commit import (
    ShardClaim,
    clean_up_store,
    commit_group,
    commit_record,
    sync_metadata,
)
from cache_schema.errors import CorruptClip, LockLost
from cache_schema.index import ClipIndex, load_index
from cache_schema.names import StoreLayout, check_fingerprint
from cache_schema.records import (
    ClipEntry,
    CommitRecord,
    SkippedClip,
    read_commit_with_crc32c,
    read_manifest,
)
from cache_schema.schema import StoreSettings
from cache_schema.shown_text import first_few
from cache_schema.storage import LocalStorage, refuse_links
from cache_schema.writer import StoreWriter
from cache_schema.zarr_shard import chunk_path, create_group

DropReason = Literal["dropped", "redo"]
"""Reason for which a clip is listed as skipped: permanently dropped, or to be made again by a
retry."""

DROPPED: DropReason = "dropped"
REDO: DropReason = "redo"

_MAX_NAMED = 5
"""Maximum number of unknown keys named in a message."""


@dataclass(frozen=True, slots=True)
class DropReport:
    """Result of `drop_clips`."""

    num_dropped: int
    """Clips removed now, and skipped clips that are now listed as dropped."""
    num_already_dropped: int
    """Clips that were already listed so."""
    shards: tuple[str, ...]
    """The shards whose records were replaced, sorted."""


def drop_clips(
    store: Path, keys: Sequence[str], *, detail: str, reason: DropReason = DROPPED
) -> DropReport:
    """Remove clips from a store: first from their shards' records, then from disk.

    Files of other clips are not touched. A dropped clip is listed as skipped; for one that was
    already skipped for any reason, only the reason changes. If the process is killed, the clips of
    some shards are dropped; the same call again drops the others.

    Args:
        store: the store's folder.
        keys: the clips; one that is already listed so counts as done.
        detail: why, as a sentence for users.
        reason: the word under which they are listed. A retry of skipped clips makes all of them
            again except those listed under `dropped`; `redo` therefore leaves clips that were
            skipped for other reasons as they are.

    Raises:
        ValueError: a key is neither in the store nor skipped there. Nothing was changed.
        ShardBusy, LockLost: another process is changing one of the shards. Earlier shards are done.
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from the store's records.
        SymlinkInStore: the store contains a symbolic link among its own files.
    """
    layout = StoreLayout(Path(store))
    refuse_links(layout)
    settings = read_manifest(layout).settings
    wanted = set(keys)
    index = load_index(LocalStorage(layout.root), settings)
    shards, dropped = _find(index, wanted, reason)
    unknown = sorted(wanted.difference(dropped, *shards.values()))
    if unknown:
        named = first_few(list(map(repr, unknown)), _MAX_NAMED)
        raise ValueError(f"{layout.root} holds no clip {named}; nothing was dropped")
    layout.staging.mkdir(exist_ok=True)
    clean_up_store(layout, settings)
    detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
    dropped_keys: set[str] = (
        set()
    )  # a clip that was retried can be in one shard and listed as skipped in another

    def edit(record: CommitRecord) -> CommitRecord:
        new, dropped_here = _without(record, shards[record.shard], reason, detail)
        dropped_keys.update(dropped_here)
        return new

    edit_records(layout, settings, index, shards, edit)
    return DropReport(len(dropped_keys), len(wanted) - len(dropped_keys), tuple(shards))


def _find(
    index: ClipIndex, wanted: Collection[str], reason: DropReason
) -> tuple[dict[str, set[str]], set[str]]:
    """The keys to drop, by shard in ascending order, and the keys that are already dropped."""
    shards: defaultdict[str, set[str]] = defaultdict(set)
    dropped: set[str] = set()
    for key in wanted:
        row = index.keys.find(key)
        if row is not None:
            shards[index.locate(row)[0]].add(key)
    for clip in index.all_skipped():
        if clip.key in wanted and _is_listed(clip, reason):
            dropped.add(clip.key)
        elif clip.key in wanted:
            shards[clip.shard].add(clip.key)
    return dict(sorted(shards.items())), dropped


def _without(
    record: CommitRecord, keys: Collection[str], reason: DropReason, detail: str
) -> tuple[CommitRecord, list[str]]:
    """A record without some clips, and which of them it held or listed for another reason."""
    other_skips = [clip for clip in record.skipped if not _is_listed(clip, reason)]
    fingerprints = {clip.key: clip.fingerprint for clip in other_skips}
    fingerprints |= {clip.key: clip.fingerprint for clip in record.clips}
    dropped_here = [clip.key for clip in record.clips] + [clip.key for clip in other_skips]
    dropped_keys = dict.fromkeys(key for key in dropped_here if key in keys)
    if not dropped_keys:
        return record, []
    clips = tuple(clip for clip in record.clips if clip.key not in keys)
    skipped = [clip for clip in record.skipped if clip.key not in dropped_keys]
    skipped += [
        SkippedClip(key, reason, detail, fingerprints[key], record.shard) for key in dropped_keys
    ]
    return replace(record, clips=clips, skipped=tuple(skipped)), list(dropped_keys)


def _is_listed(clip: SkippedClip, reason: DropReason) -> bool:
    """Whether a retry treats a skipped clip like those listed under `reason`."""
    return (clip.reason == DROPPED) == (reason == DROPPED)


Edit = Callable[[CommitRecord], CommitRecord]
"""Returns a record with fewer clips, other fingerprints or other skips, or the same record. Clips
must be those of the record, in its order and with the same files."""


def edit_records(
    layout: StoreLayout,
    settings: StoreSettings,
    index: ClipIndex,
    shards: Iterable[str],
    edit: Edit,
) -> None:
    """Replace the records of shards; groups stay, without the files of clips no longer listed.

    Files of other clips are not touched. Each record is read, written and added to the index once,
    with one in memory at a time. If the process is killed, each shard has its old record or its new
    one, and leftover files are removed by `clean_up_store`.

    Args:
        layout: the store's layout.
        settings: the store's settings.
        index: the current index; not modified, a new one is written.
        shards: the shards to edit.
        edit: called with each record.

    Raises `ShardBusy`, or `LockLost` if another process took a shard over; earlier shards are done.
    """
    folders: set[Path] = set()

    def edited() -> Iterator[tuple[CommitRecord, int]]:
        for shard in shards:
            with ShardClaim(layout, shard) as claim:
                record, crc32c = read_commit_with_crc32c(layout, settings, shard)
                new = edit(record)
                if new != record:
                    new = replace(new, generation=record.generation + 1)
                    crc32c = commit_record(claim, settings, new, replaced=crc32c)
                    kept = {clip.index for clip in new.clips}
                    with suppress(LockLost):  # the process that took it over cleans up
                        folders.update(
                            claim.discard_files(_removed_files(layout, record, kept=kept))
                        )
                    claim.clear()
            yield new, crc32c

    try:
        newer = ClipIndex.from_records(edited(), settings.arrays)
    finally:
        for folder in sorted(folders):  # all at the end, so that the disk is waited for once
            with suppress(FileNotFoundError):  # a repair has moved the group meanwhile
                sync(folder)
    StoreWriter(layout.root, settings).write_index(index.with_shards(newer))


def _removed_files(
    layout: StoreLayout, record: CommitRecord, *, kept: Container[int]
) -> Iterator[Path]:
    """Files of a shard's clips, except those whose index is in `kept`."""
    group = layout.group(record.shard, record.group)
    for clip in record.clips:
        if clip.index not in kept:
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

    The new group shares the clips' files with the old one by hard links. If the process is killed,
    the old shard or the new one is committed, and leftovers are removed by `clean_up_store`.

    Args:
        claim: the shard's claim.
        settings: the store's settings.
        record: the shard's current commit record.
        keep: clips of `record`, in their new order; their files are used unchanged.
        skipped: all skipped clips of the new record.
        crc32c: the `crc32c` of `record` on disk.
        quarantine: folder of the store to move the old group into.

    Raises `CorruptClip` if a file of a clip to keep is missing, and `LockLost` if another process
    took the shard over; nothing has changed then.
    """
    layout, shard, group = claim.layout, record.shard, claim.group
    old, generation = layout.group(shard, record.group), record.generation + 1
    for leftover in (group, layout.group(shard, generation)):
        if leftover.exists():  # left by a killed process
            claim.discard(leftover)
    with claim.guarded():
        group.mkdir()
    clips = tuple(_link(clip, index, old, claim, settings) for index, clip in enumerate(keep))
    create_group(group, settings, len(clips))
    files = sync_metadata(group, settings)
    sync_folders(group)
    generation = record.generation + 1
    new = CommitRecord(shard, generation, generation, record.source, clips, tuple(skipped), files)
    commit_group(claim, settings, group, new, replaced=crc32c)
    if old.exists():
        make_directories(quarantine)
        with suppress(LockLost), claim.guarded():  # the process that took it over cleans up
            old.rename(quarantine / old.name)
        sync(quarantine)
        sync(layout.shards)
    claim.clear()


def _link(
    clip: ClipEntry,
    index: int,
    old: Path,
    claim: ShardClaim,
    settings: StoreSettings,
) -> ClipEntry:
    """Put a clip's files into the new group, with the new `index`."""
    arrays = {}
    for name, stored in clip.arrays.items():
        path = chunk_path(name, settings.arrays[name], index)
        target = claim.group / path
        target.parent.mkdir(exist_ok=True)
        try:
            _link_or_copy(old / stored.path, target)
        except FileNotFoundError as error:
            claim.check()
            raise CorruptClip(
                f"clip {clip.key!r} in shard {clip.shard!r} of {claim.layout.root} is damaged: "
                f"file {stored.path} cannot be found",
                remedy="repair",
                subject=claim.layout.root,
            ) from error
        arrays[name] = replace(stored, path=path)
    return replace(clip, index=index, arrays=arrays)


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with add_path_to_errors(target):
            shutil.copyfile(source, target)
        sync(target)


def change_fingerprints(store: Path, fingerprints: Mapping[str, str]) -> int:
    """Change fingerprints of clips of a store by replacing their shards' records.

    The clips' files stay. If the process is killed, some shards are changed; the same call again
    changes the others.

    Args:
        store: the store's folder.
        fingerprints: new fingerprints by key; keys that are not in the store are ignored.

    Returns:
        Number of clips that were changed.

    Raises:
        ShardBusy, LockLost: another process is changing one of the shards. Earlier shards are done.
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from the store's records.
    """
    layout = StoreLayout(Path(store))
    settings = read_manifest(layout).settings
    index = load_index(LocalStorage(layout.root), settings)
    shards: dict[str, dict[str, str]] = defaultdict(dict)
    for key, fingerprint in fingerprints.items():
        row = index.keys.find(key)
        if row is not None:
            shards[index.locate(row)[0]][key] = check_fingerprint(fingerprint)
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
