"""One shard compared with its commit record, and its files read only if they match it."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from cache_schema.checksummed_json import crc32c_hex, is_sealed, opening_crc32c, parse_json
from cache_schema.errors import CorruptClip, CorruptRecord, UnknownSchemaVersion
from cache_schema.names import MAX_RECORD_BYTES, group_name
from cache_schema.records import CommitRecord, StoredArray, StoredFile, mend_hint, parse_commit
from cache_schema.schema import ArraySpec, StoreSettings
from cache_schema.storage import UNREADABLE, LocalPlace, Place
from cache_schema.zarr_shard import METADATA_FILE, DamagedFile, decode_clip, read_clip


@dataclass(frozen=True, slots=True)
class GroupFile:
    """One file of a shard's group and what is recorded of it."""

    path: str
    """Relative to the group's folder."""
    recorded: StoredFile | StoredArray
    spec: ArraySpec | None
    """Of the array, where it is a clip's file."""
    key: str | None

    def is_intact(self, data: bytes) -> bool:
        """Whether these bytes are the ones that were committed."""
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
    """Bytes of a shard's files, metadata included."""
    clips = sum(stored.bytes for clip in record.clips for stored in clip.arrays.values())
    return clips + sum(file.bytes for file in record.files.values())


def read_intact(place: Place, record: CommitRecord, file: GroupFile) -> bytes:
    """A file's bytes.

    Raises:
        CorruptClip: it is gone, or is not the one that was committed.
        StoreUnreachable: a network place did not answer.
    """
    path = f"shards/{group_name(record.shard, record.group)}/{file.path}"
    try:
        # One byte more than there should be: never all of a file that is something else.
        data = place.read_range(path, 0, file.recorded.bytes + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptClip(
            f"{_subject(record, file, place.where)} cannot be found; if the store has changed "
            f"meanwhile, start again, else {mend_hint(place.where)}"
        ) from error
    if not file.is_intact(data):
        raise CorruptClip(
            f"{_subject(record, file, place.where)} is not the one that was committed; "
            f"{mend_hint(place.where)}"
        )
    return data


def _subject(record: CommitRecord, file: GroupFile, store: str) -> str:
    clip = "" if file.key is None else f" of clip {file.key!r}"
    return f"file {file.path}{clip} in shard {record.shard!r} of {store}"


Advance = Callable[[int], None]

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, slots=True)
class Damage:
    """What one shard has lost against its commit record."""

    clips: dict[str, str]
    """What is wrong with each damaged clip, by key."""
    metadata: tuple[str, ...]
    """What is wrong with Zarr's own files."""
    foreign: tuple[str, ...] = ()
    """What lies in the shard's folder and does not belong there, relative to it; by itself it
    harms nobody, and symbolic links are damage to what lies behind them."""

    def __bool__(self) -> bool:
        return bool(self.clips or self.metadata)


def read_record(place: Place, settings: StoreSettings, shard: str) -> tuple[CommitRecord, int]:
    """A shard's commit record, and the checksum that its file opens with.

    Raises:
        CorruptRecord: it is damaged, its schema version too, or contradicts the store.
        UnknownSchemaVersion: it is intact, and was written by another version of this package.
        FileNotFoundError: there is none.
    """
    path = f"commits/{shard}.json"
    where = f"{place.where}/{path}"
    data = read_file(place, path)
    if data is None:
        raise CorruptRecord(f"{where} cannot be read")
    try:
        record = parse_commit(data, settings, shard, where=where, store=place.where)
        return record, int(opening_crc32c(data), 16)
    except UnknownSchemaVersion as error:
        if is_intact_of_its_version(data):
            raise
        raise CorruptRecord(f"{where} is damaged ({error})") from error


def is_intact_of_its_version(data: bytes) -> bool:
    """Whether a record of another schema version is sealed, and not just its number damaged."""
    return type(parse_json(data)["schema_version"]) is int and is_sealed(data)


def read_file(place: Place, path: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
    """A file's bytes; None where the disk cannot give it back, or it is no file of a store.

    Raises `FileNotFoundError` if there is no such file, and whatever else keeps a file that may be
    in order from being read, such as `PermissionError` or `StoreUnreachable`.
    """
    try:
        return place.read(path, limit)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from error
    except OSError as error:
        if error.errno in UNREADABLE:
            return None
        raise


def contradiction(place: Place, settings: StoreSettings, record: CommitRecord) -> str:
    """How intact metadata of a shard contradicts `store.json`; empty where it does not.

    It can where a damaged `store.json` was replaced by one for arrays that are packed otherwise,
    and then the shard's clips must not be taken for damaged.
    """
    group = f"shards/{group_name(record.shard, record.group)}"
    for name, spec in settings.arrays.items():
        path = f"{name}/{METADATA_FILE}"
        try:
            data = read_file(place, f"{group}/{path}")
        except FileNotFoundError:
            continue
        if data is None or crc32c_hex(data) != record.files[path].crc32c:
            continue
        (sharding,) = parse_json(data)["codecs"]
        codecs = {codec["name"] for codec in sharding["configuration"]["codecs"]}
        if ("blosc" in codecs) != (spec.compression != "none"):
            return (
                f"array {name} is packed with {', '.join(sorted(codecs))}, and store.json says "
                f"that its compression is {spec.compression!r}; put back the store.json that the "
                "shard was written with, such as from a backup or from quarantine/"
            )
    return ""


def check_shard(
    place: Place, settings: StoreSettings, record: CommitRecord, *, fast: bool, advance: Advance
) -> Damage:
    """Compare every file of a shard with its record; with `fast`, sizes only."""
    group = f"shards/{group_name(record.shard, record.group)}"
    clips: dict[str, str] = {}
    metadata: list[str] = []
    foreign: list[str] = []
    links: set[str] = set()
    if isinstance(place, LocalPlace):
        foreign = _foreign_entries(place.folder / group, settings, record)
        links = {path for path in foreign if (place.folder / group / path).is_symlink()}
    for file in group_files(record, settings):
        try:
            check = _check_size if fast else _check_content
            what = check(place, f"{group}/{file.path}", file)
            if links and not links.isdisjoint((file.path, *_folders_of(file.path))):
                what = "is, or lies behind, a symbolic link"
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


def _check_size(place: Place, path: str, file: GroupFile) -> str:
    size = file.recorded.bytes
    # Its last byte, and one that should not be there: a range is all that every place can give.
    found = len(place.read_range(path, size - 1, size + 1))
    if found == 1:
        return ""
    return f"has {'more' if found else 'fewer'} than {size} bytes"


def _check_content(place: Place, path: str, file: GroupFile) -> str:
    size = file.recorded.bytes
    with place.open(path, 0, size + 1) as opened:
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
    """What is in a shard's group and does not belong there, relative to it; symbolic links too."""
    if root.is_symlink():
        return ["."]
    files = {file.path for file in group_files(record, settings)}
    folders = {folder for path in files for folder in _folders_of(path)}
    found: list[str] = []
    pending = [root] if root.is_dir() else []
    while pending:
        with suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:  # just replaced
            for entry in entries:
                path = entry.path[len(str(root)) + 1 :]
                if path in folders and entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif path not in files or entry.is_symlink():
                    found.append(path)
    return sorted(found)


def _folders_of(path: str) -> list[str]:
    """The folders that a path lies in, with '.' for the one that it is relative to."""
    return [str(folder) for folder in PurePosixPath(path).parents]
