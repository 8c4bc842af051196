"""Columns of `index.npz`: their types, and reading, writing and validating the file.

The file is an ordinary NumPy archive, uncompressed and without pickled objects. Its checksums are
those of zip: every member is read to its end, where zip verifies it. No allocation exceeds the size
of the file. Rows are checked in numpy block by block, so that temporary memory stays small.
"""

import io
import itertools
import operator
import os
import zipfile
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

Columns = dict[str, np.ndarray]

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
    types = column_types(settings.arrays)
    body = {name: np.asarray(columns[name], dtype) for name, dtype in types.items()}
    store = np.array([store_crc32c], "<u4")
    np.savez(file, allow_pickle=False, **{STORE_CRC32C: store}, **_head(settings), **body)


def write_archive(
    file: BinaryIO,
    columns: Mapping[str, np.ndarray],
    types: Mapping[str, str],
    settings: StoreSettings,
) -> None:
    """Write an archive of columns of these data types, which belongs to the store."""
    body = {name: np.asarray(columns[name], dtype) for name, dtype in types.items()}
    np.savez(file, allow_pickle=False, **_head(settings), **body)


def _head(settings: StoreSettings) -> dict[str, np.ndarray]:
    return {
        _VERSION: np.array([SCHEMA_VERSION], "<u4"),
        _SETTINGS: np.frombuffer(settings.hash.encode("ascii"), np.uint8),
    }


def read_columns(source: bytes | Path, settings: StoreSettings) -> dict[str, np.ndarray]:
    """The columns of an index, with `STORE_CRC32C`, as read-only arrays in memory.

    Raises `DamagedIndex`, or `FileNotFoundError` for a path that does not exist.
    """
    return read_archive(source, column_types(settings.arrays) | {STORE_CRC32C: "<u4"}, settings)


def read_archive(
    source: bytes | Path, types: Mapping[str, str], settings: StoreSettings
) -> dict[str, np.ndarray]:
    """Columns of these data types of an archive of the store; its other columns are not read.

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
            return {name: _column(file, name, dtype) for name, dtype in types.items()}
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
