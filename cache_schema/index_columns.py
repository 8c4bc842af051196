"""Columns of `index.npz`: reading, writing, validating, building and merging them.

The file is an ordinary NumPy archive, uncompressed and without pickled objects. Its checksums are
those of zip: every member is read to its end, where zip verifies it. No allocation exceeds the size
of the file. Rows are checked in numpy block by block, so that temporary memory stays small.
"""

import io
import itertools
import operator
import os
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cache_schema.names import (
    FINGERPRINT_DIGITS,
    MAX_CLIP_INDEX,
    MAX_GENERATION,
    MAX_INDEX_BYTES,
    SCHEMA_VERSION,
    check_identifier,
    check_key,
    is_shard_name,
)
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.records import CommitRecord
from cache_schema.schema import StoreSettings
from cache_schema.storage import open_regular
from cache_schema.zarr_shard import file_bytes_range

COLUMNS = {
    "keys.text": "u1",
    "keys.ends": "<u8",
    "clips.shard": "<u4",
    "clips.index": "<u4",
    "clips.fingerprint": f"S{FINGERPRINT_DIGITS}",
    "shards.name.text": "u1",
    "shards.name.ends": "<u8",
    "shards.source.text": "u1",
    "shards.source.ends": "<u8",
    "shards.generation": "<u4",
    "shards.group": "<u4",
    "shards.crc32c": "<u4",
    "skipped.key.text": "u1",
    "skipped.key.ends": "<u8",
    "skipped.reason.text": "u1",
    "skipped.reason.ends": "<u8",
    "skipped.detail.text": "u1",
    "skipped.detail.ends": "<u8",
    "skipped.fingerprint": f"S{FINGERPRINT_DIGITS}",
    "skipped.shard": "<u4",
}
"""Data types of all columns except those of arrays.

Per clip, in ascending order of keys: `clips.shard`, the row of its shard; `clips.index`, its index
there; and its fingerprint. Per shard, in ascending order of names: contents of its commit record,
and the record's `crc32c`. Per skipped clip, shard by shard: contents of the record. Texts are
concatenated UTF-8 (`text`) and the end of each one (`ends`)."""

ARRAY_COLUMNS = {"bytes": "<u8", "crc32c": "<u4", "table_crc32c": "<u4"}
"""Per array and clip, as `arrays.<name>.<column>`: size of the file, checksum of the values, and
checksum of the file's table of chunks."""

STORE_CRC32C = "store.crc32c"
"""Column with one number: the `crc32c` of `store.json` when the index was written."""

_VERSION = "schema_version"
_SETTINGS = "settings_hash"


class DamagedIndex(ValueError):  # noqa: N818 (named after the condition, like the other errors)
    """The bytes are not an index, or not the index of this store."""


def column_types(arrays: Iterable[str]) -> dict[str, str]:
    """Data types of all columns of a store with these arrays."""
    array_columns = {
        f"arrays.{name}.{column}": dtype
        for name in arrays
        for column, dtype in ARRAY_COLUMNS.items()
    }
    return COLUMNS | array_columns


def write_columns(
    file: BinaryIO, columns: Mapping[str, np.ndarray], settings: StoreSettings, store_crc32c: int
) -> None:
    """Write an archive whose bytes depend only on the columns and on `store.json`.

    Args:
        file: open for writing.
        columns: the columns of `column_types`.
        settings: the store's settings.
        store_crc32c: the `crc32c` of its `store.json`.
    """
    head = {
        STORE_CRC32C: np.array([store_crc32c], "<u4"),
        _VERSION: np.array([SCHEMA_VERSION], "<u4"),
        _SETTINGS: np.frombuffer(settings.hash.encode("ascii"), np.uint8),
    }
    types = column_types(settings.arrays)
    body = {name: np.asarray(columns[name], dtype) for name, dtype in types.items()}
    np.savez(file, allow_pickle=False, **head, **body)


def read_columns(source: bytes | Path, settings: StoreSettings) -> dict[str, np.ndarray]:
    """The columns of an archive, with `STORE_CRC32C`, as read-only arrays in memory.

    Raises `DamagedIndex`, or `FileNotFoundError` for a path that does not exist.
    """
    try:
        with _open(source) as opened, zipfile.ZipFile(opened) as file:
            _check_sizes(file, opened)
            (version,) = _column(file, _VERSION, "<u4").tolist()
            if version != SCHEMA_VERSION:
                raise DamagedIndex(f"it has schema version {version}, not {SCHEMA_VERSION}")
            if _column(file, _SETTINGS, "u1").tobytes() != settings.hash.encode("ascii"):
                raise DamagedIndex("it belongs to a store with other settings")
            types = column_types(settings.arrays)
            columns = {name: _column(file, name, dtype) for name, dtype in types.items()}
            return columns | {STORE_CRC32C: _column(file, STORE_CRC32C, "<u4")}
    except (FileNotFoundError, DamagedIndex):
        raise
    except Exception as error:  # whatever damaged bytes make zipfile and NumPy raise
        raise DamagedIndex(f"it cannot be read ({type(error).__name__}: {error})") from error


def num_listed_shards(path: Path) -> int:
    """Number of shards an archive lists, read from one column; 0 if it is missing or damaged."""
    try:
        with _open(path) as opened, zipfile.ZipFile(opened) as file:
            _check_sizes(file, opened)
            return len(_column(file, "shards.crc32c", COLUMNS["shards.crc32c"]))
    except Exception:  # whatever damaged bytes make zipfile and NumPy raise
        return 0


def _open(source: bytes | Path) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return os.fdopen(open_regular(str(source)), "rb")


def _check_sizes(file: zipfile.ZipFile, opened: BinaryIO) -> None:
    """Check that members are uncompressed and together no larger than the archive."""
    size = opened.seek(0, os.SEEK_END)
    if size > MAX_INDEX_BYTES:
        raise DamagedIndex(f"it has {size} bytes, more than {MAX_INDEX_BYTES}")
    members = file.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise DamagedIndex("a column is compressed")
    if sum(member.file_size for member in members) > size:
        raise DamagedIndex("its columns are larger than the file")


def _column(file: zipfile.ZipFile, name: str, dtype: str) -> np.ndarray:
    data = file.read(f"{name}.npy")
    head = io.BytesIO(data)
    if np.lib.format.read_magic(head) != (1, 0):
        raise DamagedIndex(f"{name} is not a column")
    shape, _, found = np.lib.format.read_array_header_1_0(head)
    if found != np.dtype(dtype) or len(shape) != 1:
        raise DamagedIndex(f"{name} is {found} {shape}")
    return np.frombuffer(data, dtype, shape[0], head.tell())


_SLASH, _DOT = b"/."
_HEX = b"0123456789abcdef"

_BLOCK_ROWS = 16_384
"""Rows per block."""


def check_columns(columns: Mapping[str, np.ndarray], settings: StoreSettings) -> None:
    """Raise `ValueError` for names, keys, sizes or numbers that no record may have."""
    shards = SortedText(columns["shards.name.text"], columns["shards.name.ends"])
    names = list(shards)
    for name in names:
        if not is_shard_name(name):
            raise ValueError(f"it has a shard with the invalid name {name!r}")
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise ValueError("its shards are not in ascending order of names")
    if (columns["shards.generation"] > MAX_GENERATION).any():
        raise ValueError("a shard's generation is too large")
    if (columns["shards.group"] > columns["shards.generation"]).any():
        raise ValueError("a shard's group is of a later generation than the shard")
    keys = SortedText(columns["keys.text"], columns["keys.ends"])
    _check_keys(keys)
    _check_order(keys)
    _check_keys(PackedText(columns["skipped.key.text"], columns["skipped.key.ends"]))
    for column in ("shards.source", "skipped.detail"):
        texts = PackedText(columns[f"{column}.text"], columns[f"{column}.ends"])
        for _, blob, ends in _blocks(texts):
            _check_utf8(blob, ends)
    reasons = PackedText(columns["skipped.reason.text"], columns["skipped.reason.ends"])
    for reason in set(itertools.chain.from_iterable(reasons.pieces())):
        check_identifier(reason.decode("utf-8"), "reason for skipping a clip")
    for column in ("clips.fingerprint", "skipped.fingerprint"):
        for first in range(0, len(columns[column]), _BLOCK_ROWS):
            if columns[column][first : first + _BLOCK_ROWS].tobytes().translate(None, _HEX):
                raise ValueError(f"{column} has a value that is not a fingerprint")
    if (columns["clips.index"] > MAX_CLIP_INDEX).any():
        raise ValueError("a clip's index is too large")
    for name, spec in settings.arrays.items():
        minimum, maximum = file_bytes_range(spec)
        sizes = columns[f"arrays.{name}.bytes"]
        if ((sizes < minimum) | (sizes > maximum)).any():
            raise ValueError(f"a file of array {name} is not of {minimum} to {maximum} bytes")


def _blocks(texts: PackedText) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Texts block by block: the first one's row, their bytes, and the end of each in these."""
    for first in range(0, len(texts), _BLOCK_ROWS):
        ends = texts.ends[first : first + _BLOCK_ROWS]
        origin = texts.ends[first - 1] if first else np.uint64(0)
        yield first, texts.blob[origin : ends[-1]], ends - origin


def _check_utf8(blob: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Start of each text of a block; `ValueError` unless all of them are UTF-8."""
    blob.tobytes().decode("utf-8")
    starts = np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
    if (blob[starts[starts < len(blob)]] & 0xC0 == 0x80).any():
        raise ValueError("a text begins inside a character")
    return starts


def _check_keys(keys: PackedText) -> None:
    """Apply `check_key`, but call it only for texts that might violate it."""
    for first, blob, ends in _blocks(keys):
        starts = _check_utf8(blob, ends)
        lengths = ends - starts
        doubtful = (lengths == 0) | (lengths > 256)
        doubtful[lengths > 0] |= blob[starts[lengths > 0]] == _SLASH
        odd = (blob < 0x20) | (blob == 0x7F)
        # A C1 control is 0xC2 followed by a byte below 0xA0; '..' is any two dots in a row.
        odd[1:] |= (blob[:-1] == 0xC2) & (blob[1:] < 0xA0)
        odd[1:] |= (blob[:-1] == _DOT) & (blob[1:] == _DOT)
        doubtful[np.searchsorted(ends, np.flatnonzero(odd), side="right")] = True
        for row in np.flatnonzero(doubtful).tolist():
            check_key(keys[first + row])


def _check_order(keys: PackedText) -> None:
    before = b""
    for piece in keys.pieces():
        if before >= piece[0] or any(map(operator.ge, piece, piece[1:])):
            raise ValueError("its keys are not in order")
        before = piece[-1]


Columns = dict[str, np.ndarray]

_FINGERPRINT = COLUMNS["clips.fingerprint"]


class DuplicateKey(ValueError):  # noqa: N818 (named after the condition, like the other errors)
    """Two clips of the store have the same key."""

    def __init__(self, key: str, shards: tuple[str, str]) -> None:
        super().__init__(f"clip {key!r} is in shards {shards[0]!r} and {shards[1]!r}")


def columns_of_records(
    records: Iterable[tuple[CommitRecord, int]], arrays: Iterable[str]
) -> Columns:
    """Build the columns from commit records, each with its `crc32c`.

    Records are consumed one at a time and not kept. Raises `DuplicateKey` if two clips have the
    same key.
    """
    names = tuple(arrays)
    keys: list[bytes] = []
    shards: list[tuple[str, str, int, int, int]] = []
    skipped: list[tuple[str, str, str]] = []
    fingerprints, skipped_fingerprints = bytearray(), bytearray()
    clip_shard, clip_index, skipped_shard = array("I"), array("I"), array("I")
    facts = {name: (array("Q"), array("I"), array("I")) for name in names}  # as `FileFacts`
    for number, (record, crc32c) in enumerate(records):
        shards.append((record.shard, record.source, record.generation, record.group, crc32c))
        for clip in record.clips:
            keys.append(clip.key.encode("utf-8"))
            clip_shard.append(number)
            clip_index.append(clip.index)
            fingerprints += clip.fingerprint.encode("ascii")
            for name in names:
                for column, fact in zip(facts[name], clip.arrays[name].facts, strict=True):
                    column.append(fact)
        for skipped_clip in record.skipped:
            skipped.append((skipped_clip.key, skipped_clip.reason, skipped_clip.detail))
            skipped_fingerprints += skipped_clip.fingerprint.encode("ascii")
            skipped_shard.append(number)
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    found: Columns = {
        **_text("keys", SortedText.from_utf8(keys[row] for row in order.tolist())),
        "clips.shard": np.frombuffer(clip_shard, np.uint32)[order],
        "clips.index": np.frombuffer(clip_index, np.uint32)[order],
        "clips.fingerprint": np.frombuffer(fingerprints, _FINGERPRINT)[order],
        **_text("shards.name", PackedText.from_strings(shard[0] for shard in shards)),
        **_text("shards.source", PackedText.from_strings(shard[1] for shard in shards)),
        "shards.generation": np.array([shard[2] for shard in shards], np.uint32),
        "shards.group": np.array([shard[3] for shard in shards], np.uint32),
        "shards.crc32c": np.array([shard[4] for shard in shards], np.uint32),
        **_text("skipped.key", PackedText.from_strings(clip[0] for clip in skipped)),
        **_text("skipped.reason", PackedText.from_strings(clip[1] for clip in skipped)),
        **_text("skipped.detail", PackedText.from_strings(clip[2] for clip in skipped)),
        "skipped.fingerprint": np.frombuffer(skipped_fingerprints, _FINGERPRINT),
        "skipped.shard": np.frombuffer(skipped_shard, np.uint32),
    }
    for name in names:
        for (column_name, dtype), column in zip(ARRAY_COLUMNS.items(), facts[name], strict=True):
            found[f"arrays.{name}.{column_name}"] = np.frombuffer(column, dtype)[order]
    by_name = sorted(range(len(shards)), key=lambda number: shards[number][0])
    found = _with_shards(found, np.array(by_name, np.int64))
    _refuse_duplicates(keys, order, found)
    return found


def merged_columns(old: Columns, kept: np.ndarray, new: Columns) -> Columns:
    """Merge the `kept` shards of `old` (one boolean each) with all shards of `new`.

    No shard may be in both. Raises `DuplicateKey` if a key is.
    """
    old = _of_shards(old, kept)
    old_keys = SortedText(old["keys.text"], old["keys.ends"])
    new_keys = SortedText(new["keys.text"], new["keys.ends"])
    positions = np.empty(len(new_keys), np.int64)
    row = 0
    for piece in new_keys.pieces():
        for key in piece:
            positions[row] = position = old_keys.position(key)
            if position < len(old_keys) and old_keys.utf8(position) == key:
                shards = (_shard_name(old, position), _shard_name(new, row))
                raise DuplicateKey(key.decode("utf-8"), shards)
            row += 1
    order = np.insert(np.arange(len(old_keys)), positions, np.arange(len(new_keys)) + len(old_keys))
    num_shards = len(old["shards.crc32c"])
    found: Columns = {}
    for name in old:  # one column at a time: together they are as large as the index
        if name.endswith(".text"):
            ends = f"{name[:-5]}.ends"
            text = PackedText(
                np.concatenate([old[name], new[name]]),
                np.concatenate([old[ends], new[ends] + np.uint64(len(old[name]))]),
            )
            found |= _text(name[:-5], text.take(order) if name == "keys.text" else text)
        elif not name.endswith(".ends"):
            added = new[name]
            if name in ("clips.shard", "skipped.shard"):
                added = added + added.dtype.type(num_shards)
            both = np.concatenate([old[name], added])
            found[name] = both[order] if name.startswith(("clips.", "arrays.")) else both
    names = list(PackedText(found["shards.name.text"], found["shards.name.ends"]))
    return _with_shards(found, np.array(sorted(range(len(names)), key=names.__getitem__), np.int64))


def _of_shards(columns: Columns, kept: np.ndarray) -> Columns:
    if kept.all():
        return columns
    clips = np.flatnonzero(kept[columns["clips.shard"]])
    skipped = np.flatnonzero(kept[columns["skipped.shard"]])
    columns = _rows(columns, clips, "keys", "clips.", "arrays.")
    return _with_shards(_rows(columns, skipped, "skipped."), np.flatnonzero(kept))


def _with_shards(columns: Columns, rows: np.ndarray) -> Columns:
    """Reorder the shards by `rows`, and renumber the shards of clips accordingly."""
    number = np.zeros(len(columns["shards.crc32c"]), np.uint32)
    number[rows] = np.arange(len(rows), dtype=np.uint32)
    found = _rows(columns, rows, "shards.")
    found["clips.shard"] = number[columns["clips.shard"]]
    found["skipped.shard"] = number[columns["skipped.shard"]]
    # A stable sort keeps the order of the record within each shard.
    return _rows(found, np.argsort(found["skipped.shard"], kind="stable"), "skipped.")


def _rows(columns: Columns, rows: np.ndarray, *prefixes: str) -> Columns:
    found = dict(columns)
    for name in columns:
        if name.startswith(prefixes) and name.endswith(".text"):
            what = name[:-5]
            text = PackedText(columns[name], columns[f"{what}.ends"])
            found |= _text(what, text.take(rows))
        elif name.startswith(prefixes) and not name.endswith(".ends"):
            found[name] = columns[name][rows]
    return found


def _text(name: str, text: PackedText) -> Columns:
    return {f"{name}.text": text.blob, f"{name}.ends": text.ends}


def _refuse_duplicates(
    keys: list[bytes], order: np.ndarray, columns: Mapping[str, np.ndarray]
) -> None:
    rows = order.tolist()
    for position in range(1, len(rows)):
        if keys[rows[position]] == keys[rows[position - 1]]:
            shards = (_shard_name(columns, position - 1), _shard_name(columns, position))
            raise DuplicateKey(keys[rows[position]].decode("utf-8"), shards)


def _shard_name(columns: Mapping[str, np.ndarray], row: int) -> str:
    names = PackedText(columns["shards.name.text"], columns["shards.name.ends"])
    return names[int(columns["clips.shard"][row])]
