"""Bringing the shards of several stores together in one; used by the console's `cache merge`.

Everything that could be refused is refused before any work. Then shard after shard is brought in
whole: its files are read, compared with their checksums, linked or copied into staging under the
shard's lock, renamed into place and committed. What is committed is not done again.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache_schema.atomic_io import FileLock, make_directories, sync, sync_folders, write_whole
from cache_schema.checksummed_json import seal, unseal
from cache_schema.claim import ShardClaim, staged_records
from cache_schema.clip_index import load_index
from cache_schema.commit import commit_group, sweep_store
from cache_schema.errors import CacheError, SettingsMismatch
from cache_schema.maintenance.check_shard import GroupFile, group_files, num_bytes, read_intact
from cache_schema.names import StoreLayout, check_shard_name
from cache_schema.records import (
    CommitRecord,
    StoreManifest,
    committed_shards,
    read_commit,
    read_manifest,
)
from cache_schema.schema import StoreSettings, differing_settings
from cache_schema.storage import LocalPlace, refuse_links
from cache_schema.writer import StoreWriter

Advance = Callable[[int], None]

_NAMED = 3
"""How many of a list a message names."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge_stores` did."""

    store: Path
    shards: tuple[str, ...]
    """Names, in the target, of the shards that were brought in now."""
    num_present: int
    """Shards of the sources that the target had already."""
    num_clips: int
    """Clips of the shards that were brought in now."""
    num_bytes: int
    num_linked_bytes: int
    """Bytes of them that both stores share on disk."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A shard of a source, and what it will be called in the target."""

    source: StoreLayout
    shard: str
    name: str
    present: bool


def merge_stores(
    target: Path,
    sources: Sequence[Path],
    *,
    prefix: str | None = None,
    advance: Advance | None = None,
) -> MergeReport:
    """Bring every shard of the sources into the target; a second run goes on where one ended.

    Files are shared with the source by hard links on one file system, and copied elsewhere. Each
    is read and compared with its checksum on the way.

    Args:
        target: folder of a store; where there is none, one is made with the first source's
            settings and provenance.
        sources: folders of stores with the same settings and compression.
        prefix: put before the shards' names, where two stores use the same ones.
        advance: called with the bytes done, of files that are there already too.

    Raises:
        SettingsMismatch: the stores hold different things, or the same packed differently.
        ValueError: two shards of one name differ, a clip's key is in two shards, or the target's
            folder has not the name of such a store. Nothing was done.
        CorruptRecord: a record of a store is damaged or lost. Nothing was done.
        CorruptClip: a source is damaged. Shards before that one are merged.
        SymlinkInStore: a store has a symbolic link where only its own files may be.
        ShardBusy, LockLost: another process writes one of the shards.
    """
    target = Path(target)
    layouts = [StoreLayout(Path(source)) for source in sources]
    if not layouts:
        raise ValueError("name at least one store to merge")
    manifest = _common_manifest(StoreLayout(target), layouts)
    settings = manifest.settings
    for each in (StoreLayout(target), *layouts):
        refuse_links(each)
        if each.store_file.exists():
            load_index(LocalPlace(each.root), settings)  # a lost record must not be covered up
    arrivals = _plan(StoreLayout(target), layouts, settings, prefix or "")
    layout = _target_layout(target, manifest)
    tell = advance or (lambda _: None)
    brought: list[str] = []
    clips = total = linked = 0
    for arrival in arrivals:
        record = read_commit(arrival.source, settings, arrival.shard)
        if arrival.present:
            tell(num_bytes(record))
            continue
        linked += _bring(arrival, record, layout, settings, tell)
        brought.append(arrival.name)
        clips += len(record.clips)
        total += num_bytes(record)
    sweep_store(layout, settings)
    StoreWriter(target, settings).write_index()
    return MergeReport(target, tuple(brought), len(arrivals) - len(brought), clips, total, linked)


def _common_manifest(target: StoreLayout, sources: Sequence[StoreLayout]) -> StoreManifest:
    """The target's record, or the first source's where there is no target yet."""
    first = target if target.store_file.exists() else sources[0]
    manifest = read_manifest(first)
    for source in sources:
        differing = differing_settings(read_manifest(source).settings, manifest.settings)
        if differing:
            raise SettingsMismatch(
                f"{source.root} and {first.root} differ in {', '.join(differing)}; only stores "
                "with the same settings and compression can be merged"
            )
    return manifest


def _target_layout(target: Path, manifest: StoreManifest) -> StoreLayout:
    layout = StoreLayout(target)
    wanted = manifest.settings.folder_name
    if not layout.store_file.exists() and target.name != wanted:
        raise ValueError(
            f"there is no store in {target}; a new one of these settings must be called {wanted}, "
            f"such as {target / wanted}"
        )
    make_directories(layout.staging)
    with FileLock(layout.store_lock, wait=True, what=f"store {target}"):
        if not layout.store_file.exists():
            write_whole(
                layout.store_file,
                seal(manifest.as_dict()),
                temporary=layout.staging / ".store.json",
            )
            sync(target.parent)
    make_directories(layout.shards)
    make_directories(layout.commits)
    return layout


def _plan(
    target: StoreLayout, sources: Sequence[StoreLayout], settings: StoreSettings, prefix: str
) -> list[_Arrival]:
    """Every shard of the sources; `ValueError` if they cannot all be in one store."""
    contents: dict[str, str] = {}  # of the target as it will be, by shard
    shard_of_key: dict[str, str] = {}
    arrivals: list[_Arrival] = []
    clashes: list[str] = []
    twice: list[str] = []
    for layout, shard in _shards_of(target, sources):
        record = read_commit(layout, settings, shard)
        is_source = layout is not target
        name = check_shard_name(prefix + shard) if is_source else shard
        content = _content(record, settings)
        if is_source:
            present = content in (contents.get(name), contents.get(shard))
            arrivals.append(_Arrival(layout, shard, name, present))
            if present:
                continue
        if name in contents or (is_source and _begun_otherwise(target, record, name)):
            clashes.append(f"{name!r} of {layout.root}")
        contents[name] = content
        for clip in record.clips:
            other = shard_of_key.setdefault(clip.key, name)
            if other != name:
                twice.append(f"{clip.key!r} (shards {other!r} and {name!r})")
    if clashes:
        raise ValueError(
            f"{target.root} has, or would get, other shards of the same names as "
            f"{_some(clashes)}; name the ones that are merged differently with --prefix, such as "
            "--prefix second-"
        )
    if twice:
        raise ValueError(
            f"clips would be in {target.root} twice: {_some(twice)}; take them out of one of the "
            "stores with sam2vx-pipeline cache drop"
        )
    return arrivals


def _shards_of(
    target: StoreLayout, sources: Sequence[StoreLayout]
) -> Iterator[tuple[StoreLayout, str]]:
    for layout in (target, *sources):
        for shard in committed_shards(layout):
            yield layout, shard


def _content(record: CommitRecord, settings: StoreSettings) -> str:
    """Equal for shards that hold the same, whatever they are called and how often replaced."""
    unnamed = replace(record, shard="", generation=0, group=0)
    return hashlib.sha256(seal(unnamed.as_dict(settings.hash))).hexdigest()


def _begun_otherwise(target: StoreLayout, record: CommitRecord, name: str) -> bool:
    """Whether a writer has begun, and not finished, a shard of that name from another input."""
    records = staged_records(target, name)
    if records is None:
        return False
    first = f"{0:08d}.json"
    try:
        data = LocalPlace(records).read(first)
        found = unseal(data, f"{records}/{first}", store=target.root)
        return bool(found["source"] != record.source)
    except (OSError, CacheError, KeyError):
        return False  # a writer would not go on from there either


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return ", ".join(things[:_NAMED]) + more


def _bring(
    arrival: _Arrival,
    record: CommitRecord,
    target: StoreLayout,
    settings: StoreSettings,
    tell: Advance,
) -> int:
    """Make one shard the target's; returns the bytes that both stores share."""
    name = arrival.name
    place = LocalPlace(arrival.source.root)
    with ShardClaim(target, name) as claim:
        if target.commit(name).exists():
            raise ValueError(
                f"shard {name!r} of {target.root} was finished by another process; run the same "
                "command again"
            )
        # A folder of its own: a writer of that shard must not take its files for its own.
        incoming = claim.folder / "incoming"
        group = target.group(name, 0)
        if group.exists():  # published without a commit record, perhaps by a merge killed there
            if incoming.exists():
                claim.discard(group)
            else:
                with claim.guarded():
                    group.rename(incoming)
        make_directories(incoming)
        files = group_files(record, settings)
        linked = 0
        for file in files:
            original = arrival.source.group(record.shard, record.group) / file.path
            if _take(place, record, file, original, incoming):
                linked += file.recorded.bytes
            tell(file.recorded.bytes)
        _keep_only(incoming, {incoming / file.path for file in files})
        sync_folders(incoming)
        sync(incoming.parent)
        arrived = replace(record, shard=name, generation=0, group=0)
        commit_group(claim, settings, incoming, arrived, replaced=None)
        claim.sweep()
    return linked


def _take(
    place: LocalPlace, record: CommitRecord, file: GroupFile, original: Path, incoming: Path
) -> bool:
    """Have the intact file in `incoming`; whether it is the source's own by a hard link."""
    copy = incoming / file.path
    if copy.exists() and not (original.exists() and copy.samefile(original)):
        size = copy.stat().st_size if copy.is_file() else None
        # A run that was killed brought it.
        if size == file.recorded.bytes and file.is_intact(copy.read_bytes()):
            sync(copy)
            return False
        copy.unlink()
    data = read_intact(place, record, file)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if copy.exists():
        return True
    try:
        copy.hardlink_to(original.resolve())  # of a symbolic link, what it points to
    except OSError:  # another file system, or one without links
        write_whole(copy, data, temporary=incoming / ".incomplete")
        return False
    return True


def _keep_only(folder: Path, kept: set[Path]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()
