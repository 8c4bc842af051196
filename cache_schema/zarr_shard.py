"""Zarr v3 group of a shard: chunk layout, metadata, and verified decoding of one clip's file.

One array per name in the settings, with a leading clip axis. One Zarr shard (file) per clip; one
inner chunk per frame, or per several small frames, each with a CRC-32C. The file ends with the
table of its chunks.

Files are decoded here instead of by Zarr, which reads missing bytes as fill values, opens a file
several times and copies the data. README.md specifies the bytes.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schema.checksummed_json import crc32c_hex, parse_json
from cache_schema.schema import CLIP_DIMENSION, ArraySpec, Compression, StoreSettings
from cache_schema.storage import LocalStorage

if TYPE_CHECKING:
    import zarr
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import google_crc32c
from numcodecs import blosc

from cache_schema.atomic_io import add_path_to_errors
from cache_schema.storage import FetchedFile, OpenFile, Storage

METADATA_FILE = "zarr.json"

_BLOSC_BLOCK_BYTES = 2**19
"""Blosc's default, 32 KiB here, takes longer to decode and up to an eighth more space."""


def chunk_path(name: str, spec: ArraySpec, index: int) -> str:
    """File of clip `index` of an array, relative to the group."""
    return f"{name}/c.{index}" + ".0" * len(spec.shape)


def metadata_paths(settings: StoreSettings) -> list[str]:
    """Zarr's metadata files, relative to the group."""
    return [METADATA_FILE, *(f"{name}/{METADATA_FILE}" for name in settings.arrays)]


def create_group(path: Path, settings: StoreSettings, num_clips: int) -> "dict[str, ClipArray]":
    """Write the metadata of a group of `num_clips` clips, whose chunks may already exist.

    The bytes depend only on the settings and `num_clips`. Metadata of an earlier attempt is
    replaced.
    """
    for relative in metadata_paths(settings):
        (path / relative).unlink(missing_ok=True)
    # Imported lazily: zarr is slow to import (`--help` must stay fast), and readers do not need it.
    import zarr

    group = zarr.create_group(str(path), zarr_format=3)
    return {
        name: ClipArray(_create_array(group, name, spec, num_clips))
        for name, spec in settings.arrays.items()
    }


def _create_array(group: "zarr.Group", name: str, spec: ArraySpec, num_clips: int) -> Any:
    is_float = spec.numpy_dtype.kind == "f"
    item_bytes = spec.numpy_dtype.itemsize
    from zarr.codecs import BloscCodec, Crc32cCodec

    packing: dict[Compression, list[BloscCodec]] = {
        "none": [],
        "blosc-zstd-shuffle": [
            BloscCodec(
                cname="zstd",
                clevel=1,
                shuffle="shuffle",
                typesize=item_bytes,
                blocksize=_BLOSC_BLOCK_BYTES,
            )
        ],
    }
    return group.create_array(
        name,
        shape=(num_clips, *spec.shape),
        dtype=spec.dtype,
        shards=(1, *spec.shape),
        chunks=(1, spec.chunk_length, *spec.shape[1:]),
        filters=None,
        compressors=[*packing[spec.compression], Crc32cCodec()],
        fill_value=math.nan if is_float else 0,
        # Chunk names without folders: each clip's file costs one inode.
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=[CLIP_DIMENSION, *spec.dimension_names],
        # Otherwise a clip that equals the fill value would have no file.
        config={"write_empty_chunks": True},
    )


def found_compression(group: Path, name: str) -> Compression | None:
    """Compression of an array of a group, from its metadata; None if it cannot be determined."""
    try:
        metadata = parse_json(LocalStorage(group / name).read(METADATA_FILE))
        inner = metadata["codecs"][0]["configuration"]["codecs"]
        names = {codec["name"] for codec in inner}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return "blosc-zstd-shuffle" if "blosc" in names else "none"


class ClipArray:
    """One array of a group, written clip by clip."""

    def __init__(self, array: Any) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of clips, then the clip's axes."""
        return tuple(self._array.shape)

    def write(self, index: int, values: np.ndarray) -> None:
        """Write one clip in a single assignment, extending the clip axis if needed.

        Smaller assignments would rewrite the clip's file each time.
        """
        if self.shape[0] <= index:
            self._array.resize((index + 1, *self.shape[1:]))
        self._array[index : index + 1] = values[np.newaxis]


def content_crc32c(values: np.ndarray) -> str:
    """CRC-32C of the values in C order and little-endian."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return crc32c_hex(little.reshape(-1).view(np.uint8))


# Blosc's threads do not survive a fork, and do not help, since readers run in parallel. Zarr's
# codec disables them too.
blosc.use_threads = False

_CRC_BYTES = 4
_PAIR_BYTES = 16
_BLOSC_HEADER = struct.Struct("<4x3I")
"""Decoded size, block size and compressed size, in bytes."""


class DamagedFile(ValueError):  # noqa: N818 (named after the condition, like the other errors)
    """The bytes are not a clip with that specification, or fail a checksum."""


class FileFacts(NamedTuple):
    """Recorded facts about the file of one array of a clip."""

    bytes: int
    """Size of the file."""
    crc32c: int
    """CRC-32C of the decoded values, in C order and little-endian."""
    table_crc32c: int
    """CRC-32C of the file's table of chunks, which ties each chunk to this clip."""


class _Chunk(NamedTuple):
    offset: int
    size: int
    """Including the checksum at its end."""
    crc32c: int


def decode_clip(data: bytes | memoryview, spec: ArraySpec, facts: FileFacts) -> np.ndarray:
    """Decode a clip from all bytes of its file; `DamagedFile` if they are damaged."""
    return read_clip(FetchedFile(data), spec, facts)


def read_clip(file: OpenFile, spec: ArraySpec, facts: FileFacts) -> np.ndarray:
    """Decode a clip from its open file, whose size must be known.

    Verifying the CRC-32C of the values is cheap: it is combined from those of uncompressed chunks,
    or computed while decompressed chunks are in the CPU cache.
    """
    if file.size != facts.bytes:
        raise DamagedFile(f"it has {file.size} bytes instead of {facts.bytes}")
    values, crc32c = _read_chunks(file, spec, _read_table(file, spec, facts))
    if crc32c != facts.crc32c:
        raise DamagedFile("its values fail the clip's checksum")
    return values


def read_part(
    storage: Storage, path: str, spec: ArraySpec, facts: FileFacts, start: int, stop: int
) -> np.ndarray:
    """Read entries `start` to `stop` of a clip's leading axis.

    Over a network this takes two requests: the table of chunks, then the chunks that are needed.

    Args:
        storage: storage that holds the file.
        path: the file, relative to the storage.
        spec: specification of the array.
        facts: recorded facts about the file.
        start: the first entry, from 0.
        stop: the entry after the last one, more than `start`.
    """
    if not 0 <= start < stop <= spec.shape[0]:
        raise ValueError(f"cannot read entries {start} to {stop} of {spec.shape[0]}")
    first, last = start // spec.chunk_length, -(-stop // spec.chunk_length)
    with storage.open(path, facts.bytes - _tail_bytes(spec.num_chunks), facts.bytes) as file:
        if file.size not in (None, facts.bytes):
            raise DamagedFile(f"it has {file.size} bytes instead of {facts.bytes}")
        chunks = _read_table(file, spec, facts)[first:last]
        values = _read_chunks(file, spec, chunks)[0] if file.size is not None else None
    if values is None:
        begin = min(chunk.offset for chunk in chunks)
        end = max(chunk.offset + chunk.size for chunk in chunks)
        with storage.open(path, begin, end) as file:
            values, _ = _read_chunks(file, spec, chunks)
    origin = first * spec.chunk_length
    return values[start - origin : stop - origin]


def write_chunk_table(path: Path, spec: ArraySpec) -> int:
    """Insert the chunks' checksums before Zarr's own table, at the end of a file written by Zarr.

    Zarr's table says where the chunks are; Zarr ignores bytes between them and the table. Not
    atomic: the file is not visible to readers yet. Returns the CRC-32C of the table of chunks: the
    checksums and Zarr's table.
    """
    pairs_bytes = _PAIR_BYTES * spec.num_chunks
    with add_path_to_errors(path), path.open("r+b") as file:
        end = file.seek(-pairs_bytes - _CRC_BYTES, os.SEEK_END)
        pairs, pairs_crc = file.read(pairs_bytes), file.read()
        crcs = bytearray()
        for offset, size in np.frombuffer(pairs, "<u8").reshape(-1, 2).tolist():
            file.seek(offset + size - _CRC_BYTES)
            crcs += file.read(_CRC_BYTES)
        table = bytes(crcs) + pairs
        file.seek(end)
        file.write(table + pairs_crc)
    found: int = google_crc32c.value(table)
    return found


def file_bytes_range(spec: ArraySpec) -> tuple[int, int]:
    """Minimum and maximum size of a clip's file, whether compressed or not."""
    num_chunks, num_bytes = spec.num_chunks, spec.num_bytes
    overhead = _CRC_BYTES * num_chunks + _tail_bytes(num_chunks)
    headers = _BLOSC_HEADER.size * num_chunks
    return overhead + min(headers, num_bytes), overhead + headers + num_bytes


def _tail_bytes(num_chunks: int) -> int:
    return (_CRC_BYTES + _PAIR_BYTES) * num_chunks + _CRC_BYTES


def _read_table(file: OpenFile, spec: ArraySpec, facts: FileFacts) -> list[_Chunk]:
    """The inner chunks in the order of the leading axis, verified to be this clip's."""
    tail = np.empty(_tail_bytes(spec.num_chunks), np.uint8)
    end = facts.bytes - len(tail)
    if end < 0:
        raise DamagedFile(f"it has {facts.bytes} bytes, too few for a clip")
    _fill(file, end, [tail])
    table, pairs = tail[:-_CRC_BYTES], tail[_CRC_BYTES * spec.num_chunks : -_CRC_BYTES]
    _check(pairs, tail[-_CRC_BYTES:], "the table of its chunks")
    # Without the last four bytes: the CRC of any data followed by its own CRC is constant.
    if google_crc32c.value(table) != facts.table_crc32c:
        raise DamagedFile("the table of its chunks is not the clip's")
    crcs = table[: len(table) - len(pairs)].view("<u4").tolist()
    offsets_and_sizes = pairs.view("<u8").tolist()
    chunks = [
        _Chunk(*chunk)
        for chunk in zip(offsets_and_sizes[::2], offsets_and_sizes[1::2], crcs, strict=True)
    ]
    for chunk in chunks:
        if chunk.size <= _CRC_BYTES or chunk.offset + chunk.size > end:
            raise DamagedFile("the table of its chunks points outside it")
    return chunks


def _read_chunks(
    file: OpenFile, spec: ArraySpec, chunks: Sequence[_Chunk]
) -> tuple[np.ndarray, int]:
    shape = (len(chunks) * spec.chunk_length, *spec.shape[1:])
    values = np.empty(shape, spec.numpy_dtype.newbyteorder("<"))
    # [chunk, byte]: each chunk is decoded directly into its row.
    decoded = values.reshape(len(chunks), -1).view(np.uint8)
    chunk_bytes = spec.num_bytes // spec.num_chunks
    crc = np.empty(_CRC_BYTES, np.uint8)
    packed = np.empty(max(chunk.size for chunk in chunks), np.uint8)
    combined = 0
    for number, (offset, whole_size, crc32c) in enumerate(chunks):
        size = whole_size - _CRC_BYTES
        if spec.compression == "none":
            if size != chunk_bytes:
                raise DamagedFile(f"chunk {number} has {size} bytes instead of {chunk_bytes}")
            _fill(file, offset, [decoded[number], crc])
            _check_chunk(decoded[number], crc, crc32c, number)
            combined = _combine_crc32c(combined, crc32c, chunk_bytes)
        else:
            _fill(file, offset, [packed[:size], crc])
            _check_chunk(packed[:size], crc, crc32c, number)
            _decompress(packed[:size], decoded[number], number)
            combined = google_crc32c.extend(combined, decoded[number])
    return values.astype(spec.numpy_dtype, copy=False), combined


def _fill(file: OpenFile, offset: int, buffers: Sequence[np.ndarray]) -> None:
    wanted = sum(len(buffer) for buffer in buffers)
    found = file.fill(offset, buffers)
    if found != wanted:
        raise DamagedFile(f"it ends after {offset + found} bytes, {offset + wanted} are needed")


def _check(data: np.ndarray, crc: np.ndarray, what: str) -> int:
    found: int = google_crc32c.value(data)
    if found != int.from_bytes(crc.tobytes(), "little"):
        raise DamagedFile(f"{what} fails its checksum")
    return found


def _check_chunk(data: np.ndarray, crc: np.ndarray, crc32c: int, number: int) -> None:
    if _check(data, crc, f"chunk {number}") != crc32c:
        raise DamagedFile(f"chunk {number} is not the clip's")


def _combine_crc32c(first: int, second: int, second_bytes: int) -> int:
    """CRC-32C of two concatenated byte strings, from the CRC-32C of each."""
    combined = second
    for bit, shifted in enumerate(_crc32c_shift_table(second_bytes)):
        if first >> bit & 1:
            combined ^= shifted
    return combined


@lru_cache(maxsize=64)
def _crc32c_shift_table(num_bytes: int) -> tuple[int, ...]:
    """Effect of each bit of a CRC-32C after `num_bytes` more bytes, apart from that of the bytes.

    CRCs are linear over XOR, so appending zeros is enough to compute it.
    """
    zeros = np.zeros(num_bytes, np.uint8)
    zeros_crc32c = google_crc32c.value(zeros)
    return tuple(google_crc32c.extend(1 << bit, zeros) ^ zeros_crc32c for bit in range(32))


def _decompress(packed: np.ndarray, into: np.ndarray, number: int) -> None:
    # Blosc trusts the sizes in its header.
    sizes = (
        _BLOSC_HEADER.unpack_from(packed.data) if len(packed) >= _BLOSC_HEADER.size else (0, 0, 0)
    )
    if (sizes[0], sizes[2]) != (len(into), len(packed)):
        raise DamagedFile(f"chunk {number} is not a compressed one of {len(into)} bytes")
    try:
        blosc.decompress(packed, into)
    except Exception as error:  # Blosc raises various types for invalid data
        raise DamagedFile(f"chunk {number} cannot be decompressed ({error})") from error
