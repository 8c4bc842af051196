"""Giving clips other fingerprints, their values untouched; extraction does so where it may."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cache_schema.clip_index import load_index
from cache_schema.layout import StoreLayout, check_fingerprint
from cache_schema.manifest import CommitRecord, read_manifest
from cache_schema.places import LocalPlace
from cache_schema.upkeep.replace_shard import edit_records


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
