"""Records of a store as Python values: `store.json`, commit records and staged records.

Everything is validated when it is read, so the rest of the package can rely on it.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.checksummed_json import JSON, crc32c_digits, decode_record, plain_mapping
from cache_schema.errors import CorruptRecord, StoreNotFound
from cache_schema.names import (
    MAX_CLIP_INDEX,
    MAX_GENERATION,
    StoreLayout,
    check_fingerprint,
    check_identifier,
    check_key,
    is_shard_name,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import UNREADABLE, LocalStorage, Storage
from cache_schema.zarr_shard import FileFacts, chunk_path, file_bytes_range, metadata_paths

_MAX_METADATA_BYTES = 2**20
"""Maximum size of a Zarr metadata file."""

_CRC32C = re.compile(r"[0-9a-f]{8}")


class OtherSettings(CorruptRecord):
    """A commit record is intact, but belongs to a store with other settings."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of one clip on disk."""

    path: str
    """The file inside the folder of the shard's group, with forward slashes."""
    bytes: int
    """Size of the file."""
    crc32c: str
    """CRC-32C of the decoded values, in C order and little-endian; eight hexadecimal digits."""
    table_crc32c: str
    """CRC-32C of the file's table of chunks; eight hexadecimal digits."""

    @property
    def facts(self) -> FileFacts:
        """The facts that the file is verified against when read."""
        return FileFacts(self.bytes, int(self.crc32c, 16), int(self.table_crc32c, 16))

    def as_dict(self) -> dict[str, JSON]:
        """The entry as written in a record."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "crc32c": self.crc32c,
            "table_crc32c": self.table_crc32c,
        }


@dataclass(frozen=True, slots=True)
class ClipEntry:
    """A committed or staged clip: its location, fingerprint and attributes."""

    key: str
    shard: str
    index: int
    """Position on the clip axis of the shard's arrays."""
    source: str
    """The input the shard was made from, such as the name of a tar."""
    fingerprint: str
    """Identifies what the clip was made from; if it changes, the clip must be made again."""
    attributes: dict[str, JSON]
    arrays: dict[str, StoredArray]

    def as_dict(self) -> dict[str, JSON]:
        """The entry as written in a record, which has shard and source once for all clips."""
        return {
            "key": self.key,
            "index": self.index,
            "fingerprint": self.fingerprint,
            "attributes": self.attributes,
            "arrays": {name: array.as_dict() for name, array in self.arrays.items()},
        }


@dataclass(frozen=True, slots=True)
class SkippedClip:
    """A clip of the input that is not in the store, and why."""

    key: str
    reason: str
    """A word for counting, such as `too_short`."""
    detail: str
    """A sentence for users."""
    fingerprint: str
    """Fingerprint of what was available of the clip; see `ClipEntry`."""
    shard: str

    def as_dict(self) -> dict[str, JSON]:
        """The entry as written in a record."""
        return {
            "key": self.key,
            "reason": self.reason,
            "detail": self.detail,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the shard's group that belongs to no clip: Zarr metadata."""

    bytes: int
    crc32c: str
    """CRC-32C of the file itself."""

    def as_dict(self) -> dict[str, JSON]:
        """The entry as written in a record."""
        return {"bytes": self.bytes, "crc32c": self.crc32c}


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A committed shard."""

    shard: str
    generation: int
    """Number of times the record was replaced."""
    group: int
    """Generation in the name of the group's folder; see `names.group_name`."""
    source: str
    clips: tuple[ClipEntry, ...]
    skipped: tuple[SkippedClip, ...]
    files: dict[str, StoredFile]

    def as_dict(self, settings_hash: str) -> dict[str, JSON]:
        """The record as written in `commits/<shard>.json`."""
        return {
            "settings_hash": settings_hash,
            "shard": self.shard,
            "generation": self.generation,
            "group": self.group,
            "source": self.source,
            "clips": [clip.as_dict() for clip in self.clips],
            "skipped": [clip.as_dict() for clip in self.skipped],
            "files": {path: file.as_dict() for path, file in self.files.items()},
        }


@dataclass(frozen=True, slots=True)
class StoreManifest:
    """Contents of `store.json`."""

    settings: StoreSettings
    provenance: dict[str, JSON]

    def as_dict(self) -> dict[str, JSON]:
        """The record as written in `store.json`."""
        return {
            **self.settings.as_dict(),
            "settings_hash": self.settings.hash,
            "provenance": self.provenance,
        }


def read_record_file(storage: Storage, path: str) -> bytes:
    """The bytes of a record.

    Raises `CorruptRecord` if its path is not a regular file of acceptable size (but for example a
    folder or a device), or if the disk cannot read it.
    """
    try:
        return storage.read(path)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise CorruptRecord(
            f"{storage.location}/{path} cannot be read ({error.strerror})",
            remedy="repair",
            subject=storage.location,
        ) from error


def read_manifest(layout: StoreLayout) -> StoreManifest:
    """Read `store.json`; `StoreNotFound` if the folder holds no store."""
    path = layout.store_file
    try:
        data = read_record_file(LocalStorage(layout.root), path.name)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFound(
            f"{layout.root} is not a feature store: it has no {path.name}", remedy="make"
        ) from None
    return parse_manifest(data, location=str(path), store=layout.root)


def parse_manifest(data: bytes, *, location: str, store: Path | str) -> StoreManifest:
    """Parse the bytes of `store.json`; `location` and `store` name file and store in errors."""
    found = decode_record(data, location, store=store)
    return manifest_from_dict(found, location=location, store=store)


def manifest_from_dict(
    found: Mapping[str, Any], *, location: str, store: Path | str
) -> StoreManifest:
    """Validate a decoded `store.json`; `location` and `store` name file and store in errors."""
    try:
        settings = StoreSettings.from_dict(found)
        provenance = plain_mapping(found["provenance"], "provenance")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptRecord(
            f"{location} is damaged: {error}", remedy="repair", subject=store
        ) from error
    if settings.hash != found.get("settings_hash"):
        raise CorruptRecord(
            f"{location} is damaged: its settings do not match its settings_hash",
            remedy="repair",
            subject=store,
        )
    return StoreManifest(settings, provenance)


def committed_shards(layout: StoreLayout) -> list[str]:
    """Names of the committed shards, sorted."""
    files = LocalStorage(layout.root).list_folder(layout.commits.name)
    names = (file.removesuffix(".json") for file in files if file.endswith(".json"))
    return sorted(name for name in names if is_shard_name(name))


def read_commit(layout: StoreLayout, settings: StoreSettings, shard: str) -> CommitRecord:
    """Read the record of a committed shard and validate it against the store's settings.

    Raises `CorruptRecord` if it is damaged or refers to anything but the shard's own files.
    """
    return read_commit_with_crc32c(layout, settings, shard)[0]


def read_commit_with_crc32c(
    layout: StoreLayout, settings: StoreSettings, shard: str
) -> tuple[CommitRecord, int]:
    """`read_commit`, and the record's `crc32c`."""
    path = layout.commit(shard)
    try:
        data = read_record_file(LocalStorage(layout.root), f"{path.parent.name}/{path.name}")
    except FileNotFoundError:
        raise CorruptRecord(f"shard {shard!r} of {layout.root} is not committed") from None
    record = parse_commit(data, settings, shard, location=str(path), store=layout.root)
    return record, int(crc32c_digits(data), 16)


def parse_commit(
    data: bytes, settings: StoreSettings, shard: str, *, location: str, store: Path | str
) -> CommitRecord:
    """Parse the bytes of a commit record; `location` and `store` name file and store in errors."""
    found = decode_record(data, f"commit record {location}", store=store)
    if found.get("settings_hash") != settings.hash:
        raise OtherSettings(
            f"commit record {location} cannot be trusted (it belongs to a store with other "
            "settings)",
            remedy="repair",
            subject=store,
        )
    try:
        return commit_from_dict(found, settings, shard)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptRecord(
            f"commit record {location} cannot be trusted ({error})",
            remedy="repair",
            subject=store,
        ) from error


def commit_from_dict(found: Mapping[str, Any], settings: StoreSettings, shard: str) -> CommitRecord:
    """Validate a decoded commit record against the store's settings and the file's name."""
    if found["settings_hash"] != settings.hash:
        raise ValueError("it belongs to a store with other settings")
    if found["shard"] != shard:
        raise ValueError(
            f"it names shard {found['shard']!r}, but its file name is that of {shard!r}"
        )
    generation = found["generation"]
    if type(generation) is not int or not 0 <= generation <= MAX_GENERATION:
        raise ValueError(f"its generation is invalid: {generation!r}")
    group = found["group"]
    if type(group) is not int or not 0 <= group <= generation:
        raise ValueError(f"its group is invalid: {group!r:.80}")
    source = _text(found["source"])
    clips = tuple(
        parse_clip(clip, settings, shard=shard, source=source, index=clip["index"])
        for clip in found["clips"]
    )
    if any(before.index >= after.index for before, after in itertools.pairwise(clips)):
        raise ValueError("its clips are not in the order of their index")
    if len({clip.key for clip in clips}) != len(clips):
        raise ValueError("it lists a clip twice")
    files = {path: _file(file) for path, file in found["files"].items()}
    if sorted(files) != sorted(metadata_paths(settings)):
        raise ValueError(f"it lists the files {sorted(files)}")
    return CommitRecord(
        shard,
        generation,
        group,
        source,
        clips,
        tuple(parse_skipped(s, shard) for s in found["skipped"]),
        files,
    )


def parse_clip(
    found: Mapping[str, Any], settings: StoreSettings, *, shard: str, source: str, index: int
) -> ClipEntry:
    """Validate a clip's entry; its paths must be exactly those that its index gives."""
    key = check_key(found["key"])
    if type(index) is not int or found["index"] != index or not 0 <= index <= MAX_CLIP_INDEX:
        raise ValueError(f"clip {key!r} has the index {found['index']!r:.80}")
    if found["arrays"].keys() != settings.arrays.keys():
        raise ValueError(f"clip {key!r} has the arrays {sorted(found['arrays'])}")
    arrays = {}
    for name, array in found["arrays"].items():
        expected = chunk_path(name, settings.arrays[name], index)
        if array["path"] != expected:
            raise ValueError(f"clip {key!r} points at {array['path']!r} instead of {expected!r}")
        size, crc32c = _size_and_crc(array, *file_bytes_range(settings.arrays[name]))
        arrays[name] = StoredArray(expected, size, crc32c, _crc(array["table_crc32c"]))
    fingerprint = check_fingerprint(found["fingerprint"])
    attributes = plain_mapping(found["attributes"], "attributes")
    return ClipEntry(key, shard, index, source, fingerprint, attributes, arrays)


def parse_skipped(found: Mapping[str, Any], shard: str) -> SkippedClip:
    """Validate a skipped clip's entry."""
    return SkippedClip(
        check_key(found["key"]),
        check_identifier(found["reason"], "reason for skipping a clip"),
        _text(found["detail"]),
        check_fingerprint(found["fingerprint"]),
        shard,
    )


def _file(found: Mapping[str, Any]) -> StoredFile:
    return StoredFile(*_size_and_crc(found, 1, _MAX_METADATA_BYTES))


def _size_and_crc(found: Mapping[str, Any], minimum: int, maximum: int) -> tuple[int, str]:
    size = found["bytes"]
    if type(size) is not int or not minimum <= size <= maximum:
        raise ValueError(f"{size!r:.80} is not a valid size of such a file")
    return size, _crc(found["crc32c"])


def _crc(found: object) -> str:
    if not isinstance(found, str) or not _CRC32C.fullmatch(found):
        raise ValueError(f"{found!r:.80} is not a checksum")
    return found


def _text(found: object) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{found!r} is not text")
    found.encode("utf-8")  # no unpaired surrogates
    return found
