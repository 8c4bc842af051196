"""Taking clips out of a store, for good or to be made again; used by the console's `cache drop`."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cache_schema.clip_index import ClipIndex, load_index
from cache_schema.commit import sweep_store
from cache_schema.maintenance.replace_shard import edit_records
from cache_schema.names import StoreLayout
from cache_schema.records import CommitRecord, SkippedClip, read_manifest
from cache_schema.storage import LocalPlace, refuse_links

DropReason = Literal["dropped", "redo"]
"""Why a clip is listed as skipped: dropped for good, or until a retry makes it again."""

DROPPED: DropReason = "dropped"
REDO: DropReason = "redo"

_NAMED = 5
"""How many unknown keys a message names."""


@dataclass(frozen=True, slots=True)
class DropReport:
    """What `drop_clips` did."""

    num_dropped: int
    """Clips taken out now, and skipped ones that are listed as dropped from now on."""
    num_already: int
    """Clips that were listed so before."""
    shards: tuple[str, ...]
    """The shards whose records were replaced, sorted."""


def drop_clips(
    store: Path, keys: Sequence[str], *, detail: str, reason: DropReason = DROPPED
) -> DropReport:
    """Take clips out of a store: out of their shards' records, then off the disk.

    No file of another clip is touched. A dropped clip is listed as skipped; one that was skipped
    already, whatever for, changes its reason alone. A process killed in here has dropped the clips
    of some shards; the same call again drops the others.

    Args:
        store: the store's folder.
        keys: the clips; one that is listed so already counts as done.
        detail: why, as a sentence for people.
        reason: the word under which they are listed; a retry of what was skipped makes those again
            all but those that are listed under `dropped`, so that `redo` leaves skipped clips of
            other reasons as they are.

    Raises:
        ValueError: a key is neither in the store nor skipped there. Nothing was changed.
        ShardBusy, LockLost: another process is changing one of the shards. Those before it are
            done.
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from the store's records.
        SymlinkInStore: the store has a symbolic link where only its own files may be.
    """
    layout = StoreLayout(Path(store))
    refuse_links(layout)
    settings = read_manifest(layout).settings
    wanted = set(keys)
    index = load_index(LocalPlace(layout.root), settings)
    shards, dropped = _find(index, wanted, reason)
    unknown = sorted(wanted.difference(dropped, *shards.values()))
    if unknown:
        named = ", ".join(repr(key) for key in unknown[:_NAMED])
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise ValueError(f"{layout.root} holds no clip {named}{more}; nothing was dropped")
    layout.staging.mkdir(exist_ok=True)
    sweep_store(layout, settings)
    detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
    gone: set[str] = set()  # a clip that was made again is held by one shard and listed by another

    def edit(record: CommitRecord) -> CommitRecord:
        new, of_shard = _without(record, shards[record.shard], reason, detail)
        gone.update(of_shard)
        return new

    edit_records(layout, settings, index, shards, edit)
    return DropReport(len(gone), len(wanted) - len(gone), tuple(shards))


def _find(
    index: ClipIndex, wanted: Collection[str], reason: DropReason
) -> tuple[dict[str, set[str]], set[str]]:
    """The wanted keys that are to be dropped, by shard in their order, and those that were."""
    shards: defaultdict[str, set[str]] = defaultdict(set)
    dropped: set[str] = set()
    for key in wanted:
        row = index.keys.find(key)
        if row is not None:
            shards[index.place_of(row)[0]].add(key)
    for clip in index.all_skipped():
        if clip.key in wanted and _is_listed(clip, reason):
            dropped.add(clip.key)
        elif clip.key in wanted:
            shards[clip.shard].add(clip.key)
    return dict(sorted(shards.items())), dropped


def _without(
    record: CommitRecord, keys: Collection[str], reason: DropReason, detail: str
) -> tuple[CommitRecord, list[str]]:
    """A record without some clips, and those that it held, or listed for another reason."""
    otherwise = [clip for clip in record.skipped if not _is_listed(clip, reason)]
    made_from = {clip.key: clip.fingerprint for clip in otherwise}
    made_from |= {clip.key: clip.fingerprint for clip in record.clips}
    of_shard = [clip.key for clip in record.clips] + [clip.key for clip in otherwise]
    gone = dict.fromkeys(key for key in of_shard if key in keys)
    if not gone:
        return record, []
    clips = tuple(clip for clip in record.clips if clip.key not in keys)
    skipped = [clip for clip in record.skipped if clip.key not in gone]
    skipped += [SkippedClip(key, reason, detail, made_from[key], record.shard) for key in gone]
    return replace(record, clips=clips, skipped=tuple(skipped)), list(gone)


def _is_listed(clip: SkippedClip, reason: DropReason) -> bool:
    """Whether a retry does with a skipped clip what it does with those of `reason`."""
    return (clip.reason == DROPPED) == (reason == DROPPED)
