"""Comparing a shard with its commit record, and reading files that match it."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from cache_schema.checksummed_json import crc32c_digits, crc32c_hex, has_valid_checksum, parse_json
from cache_schema.errors import CorruptClip, CorruptRecord, UnknownSchemaVersion
from cache_schema.names import MAX_RECORD_BYTES, group_name
from cache_schema.records import CommitRecord, StoredArray, StoredFile, parse_commit
from cache_schema.schema import ArraySpec, StoreSettings
from cache_schema.storage import UNREADABLE, LocalStorage, Storage
from cache_schema.zarr_shard import METADATA_FILE, DamagedFile, decode_clip, read_clip


@dataclass(frozen=True, slots=True)
class GroupFile:
    """One file of a shard's group, with its recorded size and checksum."""

    path: str
    """Relative to the group's folder."""
    recorded: StoredFile | StoredArray
    spec: ArraySpec | None
    """Specification of the array, if it is a clip's file."""
    key: str | None

    def is_intact(self, data: bytes) -> bool:
        """Whether these bytes are the committed ones."""
        if len(data) != self.recorded.bytes:
            return False
        if self.spec is None or isinstance(self.recorded, StoredFile):
            return crc32c_hex(data) == self.recorded.crc32c
        try:
            decode_clip(data, self.spec, self.recorded.facts)
        except DamagedFile:
            return False
        return True


def group_files(record: CommitRecord, settings: StoreSettings) -> list[GroupFile]:
    """All files of a shard's group: Zarr's metadata, then clip by clip."""
    metadata = [GroupFile(path, file, None, None) for path, file in record.files.items()]
    return metadata + [
        GroupFile(stored.path, stored, settings.arrays[name], clip.key)
        for clip in record.clips
        for name, stored in clip.arrays.items()
    ]


def num_bytes(record: CommitRecord) -> int:
    """Size of a shard's files, metadata included."""
    clips = sum(stored.bytes for clip in record.clips for stored in clip.arrays.values())
    return clips + sum(file.bytes for file in record.files.values())


def read_intact(storage: Storage, record: CommitRecord, file: GroupFile) -> bytes:
    """Read a file and verify it.

    Raises:
        CorruptClip: it is missing, or not the file that was committed.
        StoreUnreachable: a network storage did not respond.
    """
    path = f"shards/{group_name(record.shard, record.group)}/{file.path}"
    try:
        # One byte more than recorded reveals a longer file without reading all of it.
        data = storage.read_range(path, 0, file.recorded.bytes + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptClip(
            f"{_subject(record, file, storage.location)} cannot be found: it is lost, unless the "
            "store has changed meanwhile (then try again)",
            remedy="repair",
            subject=storage.location,
        ) from error
    if not file.is_intact(data):
        raise CorruptClip(
            f"{_subject(record, file, storage.location)} is not the one that was committed",
            remedy="repair",
            subject=storage.location,
        )
    return data


def _subject(record: CommitRecord, file: GroupFile, store: str) -> str:
    clip = "" if file.key is None else f" of clip {file.key!r}"
    return f"file {file.path}{clip} in shard {record.shard!r} of {store}"


Advance = Callable[[int], None]

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, slots=True)
class Damage:
    """Differences between a shard and its commit record."""

    clips: dict[str, str]
    """Description of the damage of each damaged clip, by key."""
    metadata: tuple[str, ...]
    """Descriptions of damage of Zarr's own files."""
    foreign: tuple[str, ...] = ()
    """Paths in the shard's folder that do not belong there, relative to it. They do no harm by
    themselves; symbolic links count as damage to the files behind them."""

    def __bool__(self) -> bool:
        return bool(self.clips or self.metadata)


def read_record(storage: Storage, settings: StoreSettings, shard: str) -> tuple[CommitRecord, int]:
    """A shard's commit record, and its `crc32c`.

    Raises:
        CorruptRecord: it is damaged (possibly its schema version), or contradicts the store.
        UnknownSchemaVersion: it is intact, but was written with another schema version.
        FileNotFoundError: there is none.
    """
    path = f"commits/{shard}.json"
    location = f"{storage.location}/{path}"
    data = read_file(storage, path)
    if data is None:
        raise CorruptRecord(f"{location} cannot be read")
    try:
        record = parse_commit(data, settings, shard, location=location, store=storage.location)
        return record, int(crc32c_digits(data), 16)
    except UnknownSchemaVersion as error:
        if is_intact_other_version(data):
            raise
        raise CorruptRecord(f"{location} is damaged ({error})") from error


def is_intact_other_version(data: bytes) -> bool:
    """Whether a record of another schema version is intact, and not just its number damaged."""
    return type(parse_json(data)["schema_version"]) is int and has_valid_checksum(data)


def read_file(storage: Storage, path: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
    """Read a file; None if the disk cannot read it, or it is not a file of a store.

    Raises `FileNotFoundError` if it does not exist, and any error that prevents reading a file that
    may be intact, such as `PermissionError` or `StoreUnreachable`.
    """
    try:
        return storage.read(path, limit)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from error
    except OSError as error:
        if error.errno in UNREADABLE:
            return None
        raise


def compression_mismatch(storage: Storage, settings: StoreSettings, record: CommitRecord) -> str:
    """Describe how intact metadata of a shard contradicts the compression in `store.json`, or "".

    This happens if a damaged `store.json` was replaced by one with another compression; the shard's
    clips must not be reported as damaged then.
    """
    group = f"shards/{group_name(record.shard, record.group)}"
    for name, spec in settings.arrays.items():
        path = f"{name}/{METADATA_FILE}"
        try:
            data = read_file(storage, f"{group}/{path}")
        except FileNotFoundError:
            continue
        if data is None or crc32c_hex(data) != record.files[path].crc32c:
            continue
        (sharding,) = parse_json(data)["codecs"]
        codecs = {codec["name"] for codec in sharding["configuration"]["codecs"]}
        if ("blosc" in codecs) != (spec.compression != "none"):
            return (
                f"array {name} is encoded with {', '.join(sorted(codecs))}, but store.json says "
                f"that its compression is {spec.compression!r}; restore the store.json that the "
                "shard was written with, for example from a backup or from quarantine/"
            )
    return ""


def check_shard(
    storage: Storage, settings: StoreSettings, record: CommitRecord, *, fast: bool, advance: Advance
) -> Damage:
    """Compare every file of a shard with its record; with `fast`, only the sizes."""
    group = f"shards/{group_name(record.shard, record.group)}"
    clips: dict[str, str] = {}
    metadata: list[str] = []
    foreign: list[str] = []
    links: set[str] = set()
    if isinstance(storage, LocalStorage):
        foreign = _foreign_entries(storage.folder / group, settings, record)
        links = {path for path in foreign if (storage.folder / group / path).is_symlink()}
    for file in group_files(record, settings):
        try:
            check = _check_size if fast else _check_content
            what = check(storage, f"{group}/{file.path}", file)
            if links and not links.isdisjoint((file.path, *_folders_of(file.path))):
                what = "is a symbolic link, or behind one"
        except _ABSENT:
            what = "cannot be found"
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            what = f"cannot be read ({error.strerror})"
        if what and file.key is None:
            metadata.append(f"file {file.path} {what}")
        elif what and file.key is not None:
            clips.setdefault(file.key, f"file {file.path} {what}")
        advance(file.recorded.bytes)
    return Damage(clips, tuple(metadata), tuple(foreign))


def _check_size(storage: Storage, path: str, file: GroupFile) -> str:
    size = file.recorded.bytes
    # Read the last byte and one past the end: not every storage can report sizes.
    found = len(storage.read_range(path, size - 1, size + 1))
    if found == 1:
        return ""
    return f"has {'more' if found else 'fewer'} than {size} bytes"


def _check_content(storage: Storage, path: str, file: GroupFile) -> str:
    size = file.recorded.bytes
    with storage.open(path, 0, size + 1) as opened:
        if opened.size != size:
            return f"has {opened.size} bytes instead of {size}"
        if file.spec is None or isinstance(file.recorded, StoredFile):
            data = np.zeros(size, np.uint8)
            opened.fill(0, [data])
            return "" if crc32c_hex(data) == file.recorded.crc32c else "fails its checksum"
        try:
            read_clip(opened, file.spec, file.recorded.facts)
        except DamagedFile as error:
            return f"is damaged: {error}"
    return ""


def _foreign_entries(root: Path, settings: StoreSettings, record: CommitRecord) -> list[str]:
    """Entries of a shard's group that do not belong there, relative to it; also symbolic links."""
    if root.is_symlink():
        return ["."]
    files = {file.path for file in group_files(record, settings)}
    folders = {folder for path in files for folder in _folders_of(path)}
    found: list[str] = []
    pending = [root] if root.is_dir() else []
    while pending:
        # A folder may be replaced meanwhile.
        with suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                path = entry.path[len(str(root)) + 1 :]
                if path in folders and entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif path not in files or entry.is_symlink():
                    found.append(path)
    return sorted(found)


def _folders_of(path: str) -> list[str]:
    """The parent folders of a path; '.' for the folder that it is relative to."""
    return [str(folder) for folder in PurePosixPath(path).parents]
