"""The records of a store as Python values: `store.json`, commit records, staged records.

Written by `writer` and `shard_writer`, read by them and by `reader` and `verify`. Everything read
back is checked here, so the rest of the package can rely on it.
"""

import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.checksummed_json import JSON, opening_crc32c, plain_mapping, unseal
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
from cache_schema.storage import UNREADABLE, LocalPlace, Place
from cache_schema.zarr_shard import FileFacts, chunk_path, file_bytes_range, metadata_paths

_MAX_METADATA_BYTES = 2**20
"""Of a file that Zarr describes an array in."""

_CRC32C = re.compile(r"[0-9a-f]{8}")


class OtherSettings(CorruptRecord):
    """A commit record is whole, and of a store with other settings."""


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
    """CRC-32C of the file's table of chunks, in such digits too."""

    @property
    def facts(self) -> FileFacts:
        """What reading the file is checked against."""
        return FileFacts(self.bytes, int(self.crc32c, 16), int(self.table_crc32c, 16))

    def as_dict(self) -> dict[str, JSON]:
        """The entry as it is written in a record."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "crc32c": self.crc32c,
            "table_crc32c": self.table_crc32c,
        }


@dataclass(frozen=True, slots=True)
class ClipEntry:
    """One clip: where it lies and what is known of it."""

    key: str
    shard: str
    index: int
    """Position on the clip axis of the shard's arrays."""
    source: str
    """The input the shard was made from, such as the name of a tar."""
    fingerprint: str
    """What the clip was made from; another one means that it must be made again."""
    attributes: dict[str, JSON]
    arrays: dict[str, StoredArray]

    def as_dict(self) -> dict[str, JSON]:
        """The entry as it is written in a record, which names shard and source once for all."""
        return {
            "key": self.key,
            "index": self.index,
            "fingerprint": self.fingerprint,
            "attributes": self.attributes,
            "arrays": {name: array.as_dict() for name, array in self.arrays.items()},
        }


@dataclass(frozen=True, slots=True)
class SkippedClip:
    """One clip of the input that is not in the store, and why."""

    key: str
    reason: str
    """A word for counting, such as `too_short`."""
    detail: str
    """A sentence for people."""
    fingerprint: str
    """What there was of the clip, as in `ClipEntry`."""
    shard: str

    def as_dict(self) -> dict[str, JSON]:
        """The entry as it is written in a record."""
        return {
            "key": self.key,
            "reason": self.reason,
            "detail": self.detail,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the shard's group that is not a clip's: the metadata of Zarr."""

    bytes: int
    crc32c: str
    """CRC-32C of the file itself."""

    def as_dict(self) -> dict[str, JSON]:
        """The entry as it is written in a record."""
        return {"bytes": self.bytes, "crc32c": self.crc32c}


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A finished shard."""

    shard: str
    generation: int
    """How often the record was replaced."""
    group: int
    """The generation that the folder of the group was made for; see `layout.group_name`."""
    source: str
    clips: tuple[ClipEntry, ...]
    skipped: tuple[SkippedClip, ...]
    files: dict[str, StoredFile]

    def as_dict(self, settings_hash: str) -> dict[str, JSON]:
        """The record as it is sealed in `commits/<shard>.json`."""
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
    """What `store.json` holds."""

    settings: StoreSettings
    provenance: dict[str, JSON]

    def as_dict(self) -> dict[str, JSON]:
        """The record as it is sealed in `store.json`."""
        return {
            **self.settings.as_dict(),
            "settings_hash": self.settings.hash,
            "provenance": self.provenance,
        }


def read_record_file(place: Place, path: str) -> bytes:
    """The bytes of a record.

    Raises `CorruptRecord` where something else lies at its path, such as a folder, a device or a
    file that is too large, or where the disk cannot give it back.
    """
    try:
        return place.read(path)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise CorruptRecord(
            f"{place.where}/{path} cannot be read ({error.strerror}); {mend_hint(place.where)}"
        ) from error


def read_manifest(layout: StoreLayout) -> StoreManifest:
    """The store's own record; `StoreNotFound` if the folder holds no store."""
    path = layout.store_file
    try:
        data = read_record_file(LocalPlace(layout.root), path.name)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFound(
            f"{layout.root} is not a feature store: it has no {path.name}; run "
            "sam2vx-pipeline extract-features to make one"
        ) from None
    return parse_manifest(data, where=str(path), store=layout.root)


def parse_manifest(data: bytes, *, where: str, store: Path | str) -> StoreManifest:
    """`store.json` from its bytes; `where` and `store` name file and store in errors."""
    try:
        found = unseal(data, where, store=store)
    except CorruptRecord as error:
        raise CorruptRecord(f"{error}; {mend_hint(store)}") from error
    return manifest_from_dict(found, where=where, store=store)


def manifest_from_dict(found: Mapping[str, Any], *, where: str, store: Path | str) -> StoreManifest:
    """An unsealed `store.json`, checked; `where` and `store` name file and store in errors."""
    try:
        settings = StoreSettings.from_dict(found)
        provenance = plain_mapping(found["provenance"], "provenance")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptRecord(f"{where} is damaged: {error}; {mend_hint(store)}") from error
    if settings.hash != found.get("settings_hash"):
        raise CorruptRecord(
            f"{where} is damaged: its settings do not have the hash written beside them; "
            f"{mend_hint(store)}"
        )
    return StoreManifest(settings, provenance)


def committed_shards(layout: StoreLayout) -> list[str]:
    """Names of the finished shards, sorted."""
    files = LocalPlace(layout.root).list_folder(layout.commits.name)
    names = (file.removesuffix(".json") for file in files if file.endswith(".json"))
    return sorted(name for name in names if is_shard_name(name))


def read_commit(layout: StoreLayout, settings: StoreSettings, shard: str) -> CommitRecord:
    """The record of a finished shard, checked against the store's settings.

    Raises `CorruptRecord` if it is damaged or points at anything but the shard's own files.
    """
    return read_sealed_commit(layout, settings, shard)[0]


def read_sealed_commit(
    layout: StoreLayout, settings: StoreSettings, shard: str
) -> tuple[CommitRecord, int]:
    """`read_commit`, and the checksum that the record opens with."""
    path = layout.commit(shard)
    try:
        data = read_record_file(LocalPlace(layout.root), f"{path.parent.name}/{path.name}")
    except FileNotFoundError:
        raise CorruptRecord(f"shard {shard!r} of {layout.root} is not committed") from None
    record = parse_commit(data, settings, shard, where=str(path), store=layout.root)
    return record, int(opening_crc32c(data), 16)


def parse_commit(
    data: bytes, settings: StoreSettings, shard: str, *, where: str, store: Path | str
) -> CommitRecord:
    """A commit record from its bytes; `where` and `store` name file and store in errors."""
    try:
        found = unseal(data, f"commit record {where}", store=store)
    except CorruptRecord as error:
        raise CorruptRecord(f"{error}; {mend_hint(store)}") from error
    if found.get("settings_hash") != settings.hash:
        raise OtherSettings(
            f"commit record {where} cannot be trusted (it belongs to a store with other "
            f"settings); {mend_hint(store)}"
        )
    try:
        return commit_from_dict(found, settings, shard)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptRecord(
            f"commit record {where} cannot be trusted ({error}); {mend_hint(store)}"
        ) from error


def mend_hint(store: Path | str) -> str:
    """How to replace what is damaged in a store."""
    return (
        f"run sam2vx-pipeline cache repair {shlex.quote(str(store))}, then extract-features "
        "--retry-failed"
    )


def commit_from_dict(found: Mapping[str, Any], settings: StoreSettings, shard: str) -> CommitRecord:
    """An unsealed commit record, checked against the store's settings and the file's name."""
    if found["settings_hash"] != settings.hash:
        raise ValueError("it belongs to a store with other settings")
    if found["shard"] != shard:
        raise ValueError(f"it names shard {found['shard']!r}, its file name {shard!r}")
    generation = found["generation"]
    if type(generation) is not int or not 0 <= generation <= MAX_GENERATION:
        raise ValueError(f"it has the generation {generation!r}")
    group = found["group"]
    if type(group) is not int or not 0 <= group <= generation:
        raise ValueError(f"it has the group {group!r:.80}")
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
    """A clip's entry, whose paths must be exactly those that its index gives."""
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
    """A skipped clip's entry."""
    return SkippedClip(
        check_key(found["key"]),
        check_identifier(found["reason"], "reason for skipping a clip"),
        _text(found["detail"]),
        check_fingerprint(found["fingerprint"]),
        shard,
    )


def _file(found: Mapping[str, Any]) -> StoredFile:
    return StoredFile(*_size_and_crc(found, 1, _MAX_METADATA_BYTES))


def _size_and_crc(found: Mapping[str, Any], least: int, most: int) -> tuple[int, str]:
    size = found["bytes"]
    if type(size) is not int or not least <= size <= most:
        raise ValueError(f"{size!r:.80} is not the size of such a file")
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
