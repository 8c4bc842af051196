"""Taking clips out of a store for good; used by the console's `cache drop`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_schema.layout import StoreLayout
from cache_schema.lock import FileLock
from cache_schema.manifest import SkippedClip, committed_shards, read_commit, read_manifest
from cache_schema.settings import StoreSettings
from cache_schema.sweeping import sweep_store
from cache_schema.upkeep.replace_shard import keep_clips
from cache_schema.writer import StoreWriter

DROPPED = "dropped"
"""The reason under which a dropped clip is listed as skipped."""

_NAMED = 5
"""How many unknown keys a message names."""


@dataclass(frozen=True, slots=True)
class DropReport:
    """What `drop_clips` did."""

    num_dropped: int
    """Clips taken out now."""
    num_already: int
    """Clips that an earlier run had taken out."""
    shards: tuple[str, ...]
    """The shards that were replaced, sorted."""


def drop_clips(store: Path, keys: Sequence[str], *, detail: str) -> DropReport:
    """Take clips out of a store: their shards are replaced by ones without them, one by one.

    A dropped clip is listed as skipped, with reason `dropped`. A process killed in here has dropped
    the clips of some shards; the same call again drops the others.

    Args:
        store: the store's folder.
        keys: the clips; one that was dropped before counts as done.
        detail: why, as a sentence for people.

    Raises:
        ValueError: a key is neither in the store nor dropped from it. Nothing was changed.
        ShardBusy: another process is changing one of the shards. Those before it are done.
        CorruptClip: a clip that is kept lacks its file. Shards before that one are done.
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from the store's records.
    """
    layout = StoreLayout(Path(store))
    settings = read_manifest(layout).settings
    wanted = set(keys)
    shards, dropped = _find(layout, settings, wanted)
    unknown = sorted(wanted.difference(dropped, *shards.values()))
    if unknown:
        named = ", ".join(repr(key) for key in unknown[:_NAMED])
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise ValueError(f"{layout.root} holds no clip {named}{more}; nothing was dropped")
    layout.staging.mkdir(exist_ok=True)
    sweep_store(layout, settings)
    detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
    num_dropped = sum(
        _drop_from(layout, settings, shard, gone, detail) for shard, gone in shards.items()
    )
    StoreWriter(layout.root, settings).write_index()
    return DropReport(num_dropped, len(wanted) - num_dropped, tuple(shards))


def _find(
    layout: StoreLayout, settings: StoreSettings, wanted: Collection[str]
) -> tuple[dict[str, set[str]], set[str]]:
    """The wanted keys that are clips, by shard, and those that were dropped before."""
    shards: dict[str, set[str]] = {}
    dropped: set[str] = set()
    for shard in committed_shards(layout):
        record = read_commit(layout, settings, shard)
        if here := {clip.key for clip in record.clips if clip.key in wanted}:
            shards[shard] = here
        dropped.update(
            clip.key for clip in record.skipped if clip.reason == DROPPED and clip.key in wanted
        )
    return shards, dropped


def _drop_from(
    layout: StoreLayout, settings: StoreSettings, shard: str, keys: set[str], detail: str
) -> int:
    what = f"shard {shard!r} of {layout.root}"
    with FileLock(layout.lock(shard), wait=False, what=what):
        record = read_commit(layout, settings, shard)
        keep = [clip for clip in record.clips if clip.key not in keys]
        gone = [
            SkippedClip(clip.key, DROPPED, detail, shard)
            for clip in record.clips
            if clip.key in keys
        ]
        if gone:
            keep_clips(layout, settings, record, keep, [*record.skipped, *gone], quarantine=None)
        return len(gone)
