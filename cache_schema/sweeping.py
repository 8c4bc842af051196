"""Removing what killed processes left of finished shards; used by the writer and by `upkeep`."""

from collections import defaultdict

from cache_schema.claim import ShardClaim
from cache_schema.durable import sync
from cache_schema.errors import CorruptRecord, LockLost, ShardBusy
from cache_schema.layout import StoreLayout, parse_group_name
from cache_schema.manifest import committed_shards, read_commit
from cache_schema.settings import StoreSettings


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
