"""Merging the shards of several stores into one store.

All conflicts are refused before any work. Then shards are imported one by one: a shard's files are
read, compared with their checksums, and linked or copied into staging under the shard's lock; then
the group is renamed into place and committed. Committed shards are not imported again.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache_schema.atomic_io import make_directories, sync, sync_folders, write_atomic
from cache_schema.checksummed_json import decode_record, encode_record
from cache_schema.commit import (
    ShardClaim,
    clean_up_store,
    commit_group,
    remove_other_files,
    staged_records,
)
from cache_schema.errors import CacheError, Refused, SettingsMismatch
from cache_schema.index import load_index
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
from cache_schema.shown_text import first_few
from cache_schema.storage import LocalStorage, refuse_links
from cache_schema.writer import StoreWriter

Advance = Callable[[int], None]

_MAX_NAMED = 3
"""Maximum number of list items named in a message."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Result of `merge_stores`."""

    store: Path
    shards: tuple[str, ...]
    """Names, in the target, of the shards imported by this run."""
    num_present: int
    """Shards of the sources that the target already had."""
    num_clips: int
    """Clips of the imported shards."""
    num_bytes: int
    num_linked_bytes: int
    """Bytes of them that are hard-linked, shared by both stores."""


@dataclass(frozen=True, slots=True)
class _IncomingShard:
    """A shard of a source, and its name in the target."""

    source: StoreLayout
    shard: str
    name: str
    present: bool
    num_bytes: int


def merge_stores(
    target: Path,
    sources: Sequence[Path],
    *,
    prefix: str | None = None,
    advance: Advance | None = None,
) -> MergeReport:
    """Import every shard of the sources into the target; another run resumes an interrupted merge.

    Files are hard-linked to the source on the same file system, and copied otherwise. Each is read
    and compared with its checksum.

    Args:
        target: folder of a store; if it does not exist, it is created with the first source's
            settings and provenance.
        sources: folders of stores with the same settings and compression.
        prefix: prepended to the shards' names, for stores that use the same ones.
        advance: called with the number of bytes done, including files that already exist.

    Raises:
        SettingsMismatch: the stores have other settings or another compression.
        Refused: two shards of one name differ, or a clip's key is in two shards.
        ValueError: the target's folder does not have the name of such a store. Nothing was done.
        CorruptRecord: a record of a store is damaged or lost. Nothing was done.
        CorruptClip: a source is damaged. The shards before that one are merged.
        SymlinkInStore: a store contains a symbolic link among its own files.
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
            load_index(LocalStorage(each.root), settings)  # refuse stores with lost records
    incoming_shards = _plan(StoreLayout(target), layouts, settings, prefix or "")
    writer = _open_target(target, manifest)
    advance_by = advance or (lambda _: None)
    imported: list[str] = []
    clips = total = linked = 0
    for incoming in incoming_shards:
        if incoming.present:
            advance_by(incoming.num_bytes)
            continue
        # Read again: the records of all shards together may be larger than memory.
        record = read_commit(incoming.source, settings, incoming.shard)
        linked += _import_shard(incoming, record, StoreLayout(target), settings, advance_by)
        imported.append(incoming.name)
        clips += len(record.clips)
        total += num_bytes(record)
    clean_up_store(StoreLayout(target), settings)
    writer.write_index()
    return MergeReport(
        target, tuple(imported), len(incoming_shards) - len(imported), clips, total, linked
    )


def _common_manifest(target: StoreLayout, sources: Sequence[StoreLayout]) -> StoreManifest:
    """The target's manifest, or the first source's if there is no target yet."""
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


def _open_target(target: Path, manifest: StoreManifest) -> StoreWriter:
    """The target opened for writing; created if it does not exist."""
    layout = StoreLayout(target)
    if layout.store_file.exists():
        for folder in (layout.staging, layout.shards, layout.commits):
            make_directories(folder)
        return StoreWriter(target, manifest.settings)
    wanted = manifest.settings.folder_name
    if target.name != wanted:
        raise ValueError(
            f"there is no store in {target}; a new store with these settings must be named "
            f"{wanted}: merge into {target / wanted}"
        )
    return StoreWriter.open(target.parent, manifest.settings, provenance=manifest.provenance)


def _plan(
    target: StoreLayout, sources: Sequence[StoreLayout], settings: StoreSettings, prefix: str
) -> list[_IncomingShard]:
    """Every shard of the sources; `ValueError` if they cannot all be in one store."""
    contents: dict[str, str] = {}  # contents of the future target, by shard
    shard_of_key: dict[str, str] = {}
    incoming_shards: list[_IncomingShard] = []
    conflicts: list[str] = []
    duplicates: list[str] = []
    for layout, shard in _shards_of(target, sources):
        record = read_commit(layout, settings, shard)
        is_source = layout is not target
        name = check_shard_name(prefix + shard) if is_source else shard
        content = _content(record, settings)
        if is_source:
            present = content in (contents.get(name), contents.get(shard))
            incoming_shards.append(_IncomingShard(layout, shard, name, present, num_bytes(record)))
            if present:
                continue
        if name in contents or (is_source and _is_staged_from_other_source(target, record, name)):
            conflicts.append(f"{name!r} of {layout.root}")
        contents[name] = content
        for clip in record.clips:
            other = shard_of_key.setdefault(clip.key, name)
            if other != name:
                duplicates.append(f"{clip.key!r} (shards {other!r} and {name!r})")
    if conflicts:
        raise Refused(
            f"{target.root} has, or would get, other shards of the same names as "
            f"{first_few(conflicts, _MAX_NAMED)}",
            remedy="prefix",
        )
    if duplicates:
        raise Refused(
            f"clips would be in {target.root} twice: {first_few(duplicates, _MAX_NAMED)}",
            remedy="drop",
        )
    return incoming_shards


def _shards_of(
    target: StoreLayout, sources: Sequence[StoreLayout]
) -> Iterator[tuple[StoreLayout, str]]:
    for layout in (target, *sources):
        for shard in committed_shards(layout):
            yield layout, shard


def _content(record: CommitRecord, settings: StoreSettings) -> str:
    """Digest of a shard's contents, independent of its name and of how often it was replaced."""
    anonymous = replace(record, shard="", generation=0, group=0)
    return hashlib.sha256(encode_record(anonymous.as_dict(settings.hash))).hexdigest()


def _is_staged_from_other_source(target: StoreLayout, record: CommitRecord, name: str) -> bool:
    """Whether an uncommitted shard of that name is staged from another source."""
    records = staged_records(target, name)
    if records is None:
        return False
    first = f"{0:08d}.json"
    try:
        data = LocalStorage(records).read(first)
        found = decode_record(data, f"{records}/{first}", store=target.root)
        return bool(found["source"] != record.source)
    except (OSError, CacheError, KeyError):
        return False  # a writer would not adopt it either


def _import_shard(
    incoming: _IncomingShard,
    record: CommitRecord,
    target: StoreLayout,
    settings: StoreSettings,
    advance_by: Advance,
) -> int:
    """Import one shard into the target; returns the number of bytes that are hard-linked."""
    name = incoming.name
    storage = LocalStorage(incoming.source.root)
    with ShardClaim(target, name) as claim:
        if target.commit(name).exists():
            raise ValueError(
                f"shard {name!r} of {target.root} was committed by another process; run the same "
                "command again"
            )
        # Not `claim.group`: a writer of that shard must not adopt these files.
        folder = claim.folder / "incoming"
        group = target.group(name, 0)
        if group.exists():  # published without a commit record, perhaps by a killed merge
            if folder.exists():
                claim.discard(group)
            else:
                with claim.guarded():
                    group.rename(folder)
        make_directories(folder)
        files = group_files(record, settings)
        linked = 0
        for file in files:
            original = incoming.source.group(record.shard, record.group) / file.path
            if _link_or_copy(storage, record, file, original, folder):
                linked += file.recorded.bytes
            advance_by(file.recorded.bytes)
        remove_other_files(folder, {folder / file.path for file in files})
        sync_folders(folder)
        sync(folder.parent)
        arrived = replace(record, shard=name, generation=0, group=0)
        commit_group(claim, settings, folder, arrived, replaced=None)
        claim.clear()
    return linked


def _link_or_copy(
    storage: LocalStorage, record: CommitRecord, file: GroupFile, original: Path, folder: Path
) -> bool:
    """Put the verified file into `folder`; returns whether it is a hard link to the source's."""
    copy = folder / file.path
    if copy.exists() and not (original.exists() and copy.samefile(original)):
        size = copy.stat().st_size if copy.is_file() else None
        # A run that was killed copied it.
        if size == file.recorded.bytes and file.is_intact(copy.read_bytes()):
            sync(copy)
            return False
        copy.unlink()
    data = read_intact(storage, record, file)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if copy.exists():
        return True
    try:
        copy.hardlink_to(original.resolve())  # resolve symbolic links
    except OSError:  # another file system, or one without links
        write_atomic(copy, data, temporary=folder / ".incomplete")
        return False
    return True
