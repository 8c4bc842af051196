"""Removing clips from a store, permanently or to be extracted again."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cache_schema.clip_index import ClipIndex, load_index
from cache_schema.commit import clean_up_store
from cache_schema.maintenance.replace_shard import edit_records
from cache_schema.names import StoreLayout
from cache_schema.records import CommitRecord, SkippedClip, read_manifest
from cache_schema.storage import LocalStorage, refuse_links

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
        named = ", ".join(repr(key) for key in unknown[:_MAX_NAMED])
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        raise ValueError(f"{layout.root} holds no clip {named}{more}; nothing was dropped")
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
