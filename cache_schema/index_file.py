"""`index.npz`: reading and writing named columns in one file.

An ordinary NumPy archive, uncompressed and without pickled objects. Its checksums are those of zip:
every member is read to its end, where zip verifies it. No allocation exceeds the size of the file.
"""

import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cache_schema.names import FINGERPRINT_DIGITS, MAX_INDEX_BYTES, SCHEMA_VERSION
from cache_schema.schema import StoreSettings
from cache_schema.storage import open_regular

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
