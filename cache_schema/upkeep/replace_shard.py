"""Replacing a finished shard by one with fewer clips; used by `drop` and `repair`.

The new group shares the clips' files with the old one by hard links. Until the commit record is
replaced readers see the old group, and from then on the new one.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from os import link
from pathlib import Path

from cache_schema.committing import commit_group, safe_metadata
from cache_schema.durable import make_directories, sync, sync_folders
from cache_schema.errors import CorruptClip
from cache_schema.layout import StoreLayout
from cache_schema.manifest import ClipEntry, CommitRecord, SkippedClip, mend_hint
from cache_schema.settings import StoreSettings
from cache_schema.sweeping import sweep_committed
from cache_schema.zarr_group import chunk_path, create_group


def keep_clips(
    layout: StoreLayout,
    settings: StoreSettings,
    record: CommitRecord,
    keep: Sequence[ClipEntry],
    skipped: Sequence[SkippedClip],
    *,
    quarantine: Path | None,
) -> CommitRecord:
    """Replace a shard by its next generation, with some of its clips; the caller holds its lock.

    A process killed in here leaves the old shard or the new one, and leftovers that `sweep_store`
    removes.

    Args:
        layout: the store's paths; `.staging` exists.
        settings: the store's.
        record: the shard as it is committed now.
        keep: clips of `record`, in the order they shall have; their files are taken as they are.
        skipped: what the new record says is left out, all of it.
        quarantine: folder of the store to move the old group into; it is removed where this is
            None.

    Raises `CorruptClip` where a file of a clip to keep is missing; nothing has changed then.
    """
    shard = record.shard
    old, group = layout.group(shard, record.generation), layout.staged_group(shard)
    sweep_committed(layout, shard)
    make_directories(group)
    clips = tuple(
        _take_over(clip, index, old, group, layout, settings) for index, clip in enumerate(keep)
    )
    create_group(group, settings, len(clips))
    files = safe_metadata(group, settings)
    sync_folders(group)
    generation = record.generation + 1
    new = CommitRecord(shard, generation, record.source, clips, tuple(skipped), files)
    commit_group(layout, settings, group, new)
    if quarantine is not None and old.exists():
        make_directories(quarantine)
        old.rename(quarantine / old.name)
        sync(quarantine)
        sync(layout.shards)
    elif old.exists():
        shutil.rmtree(old)
    sweep_committed(layout, shard)
    return new


def _take_over(
    clip: ClipEntry,
    index: int,
    old: Path,
    new: Path,
    layout: StoreLayout,
    settings: StoreSettings,
) -> ClipEntry:
    """Put a clip's files into the new group, as number `index`."""
    arrays = {}
    for name, stored in clip.arrays.items():
        path = chunk_path(name, settings.arrays[name], index)
        (new / path).parent.mkdir(parents=True)
        try:
            _share(old / stored.path, new / path)
        except FileNotFoundError as error:
            raise CorruptClip(
                f"clip {clip.key!r} in shard {clip.shard!r} of {layout.root} is damaged: file "
                f"{stored.path} cannot be found; {mend_hint(layout.root)}"
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
