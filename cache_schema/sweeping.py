"""Removing what killed processes left of finished shards; used by the writer and by `upkeep`."""

import shutil
from collections import defaultdict

from cache_schema.errors import CorruptRecord, ShardBusy
from cache_schema.layout import StoreLayout, parse_group_name
from cache_schema.lock import FileLock
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
            with FileLock(layout.lock(shard), wait=False, what=f"shard {shard!r}"):
                sweep_committed(layout, shard)
                if replaced:
                    _sweep_replaced(layout, settings, shard, generations[shard])
        except ShardBusy:
            continue  # its own writer is at it


def sweep_committed(layout: StoreLayout, shard: str) -> None:
    """Remove what is left of the staging of a finished shard; its lock is held."""
    if layout.staged(shard).exists():
        shutil.rmtree(layout.staged(shard))


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


def _sweep_replaced(
    layout: StoreLayout, settings: StoreSettings, shard: str, generations: list[int]
) -> None:
    try:
        current = read_commit(layout, settings, shard).generation
    except CorruptRecord:
        return  # which group is the shard's is not known; that is for a repair
    for generation in generations:
        if generation != current:
            shutil.rmtree(layout.group(shard, generation))
