"""A shard's Zarr v3 group: chunk layout, metadata, and the checked read of one clip's file.

One array per name in the settings, with a leading clip axis. One Zarr shard (file) per clip; one
inner chunk per frame, or per several small frames, each with a CRC-32C. The file ends with the
index of the chunks.

Files are decoded here rather than by Zarr, which reads missing bytes as fill values, opens a file
several times and copies what it reads. README.md specifies the bytes.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schema.checksummed_json import crc32c_hex, parse_json
from cache_schema.schema import CLIP_DIMENSION, ArraySpec, Compression, StoreSettings
from cache_schema.storage import LocalPlace

if TYPE_CHECKING:
    import zarr
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import google_crc32c
from numcodecs import blosc

from cache_schema.atomic_io import naming
from cache_schema.storage import FetchedFile, OpenFile, Place

METADATA_FILE = "zarr.json"

_BLOSC_BLOCK_BYTES = 2**19
"""Blosc's own choice, 32 KiB here, takes longer to decode and up to an eighth more space."""


def chunk_path(name: str, spec: ArraySpec, index: int) -> str:
    """The file of clip `index` of an array, relative to the group."""
    return f"{name}/c.{index}" + ".0" * len(spec.shape)


def metadata_paths(settings: StoreSettings) -> list[str]:
    """Zarr's own files, relative to the group."""
    return [METADATA_FILE, *(f"{name}/{METADATA_FILE}" for name in settings.arrays)]


def create_group(path: Path, settings: StoreSettings, num_clips: int) -> "dict[str, ClipArray]":
    """Write the metadata of a group of `num_clips` clips, whose chunks may be there already.

    The bytes depend on the settings and `num_clips` alone. Files of an earlier attempt at the same
    paths are replaced.
    """
    for relative in metadata_paths(settings):
        (path / relative).unlink(missing_ok=True)
    # Here, since zarr takes as long to import as `--help` may, and readers do without it.
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
        # Without folders on the way to it, each clip's file costs one inode.
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=[CLIP_DIMENSION, *spec.dimension_names],
        # Without it a clip that equals the fill value has no file.
        config={"write_empty_chunks": True},
    )


def found_compression(group: Path, name: str) -> Compression | None:
    """How an array of a group is compressed, by its metadata; None where that cannot be told."""
    try:
        metadata = parse_json(LocalPlace(group / name).read(METADATA_FILE))
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
        """Write one clip in a single assignment, growing the clip axis to hold it.

        Anything smaller than a clip would rewrite the clip's file each time.
        """
        if self.shape[0] <= index:
            self._array.resize((index + 1, *self.shape[1:]))
        self._array[index : index + 1] = values[np.newaxis]


def content_crc32c(values: np.ndarray) -> str:
    """CRC-32C of the values in C order and little-endian."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return crc32c_hex(little.reshape(-1).view(np.uint8))


# Threads of its own would neither survive a fork nor help: readers run side by side. Zarr's codec
# does the same.
blosc.use_threads = False

_CRC_BYTES = 4
_PAIR_BYTES = 16
_BLOSC_HEADER = struct.Struct("<4x3I")
"""Bytes when decoded, bytes of a block, bytes as they are."""


class DamagedFile(ValueError):  # noqa: N818 (says what was found, like the other errors)
    """The bytes are not a clip's of that specification, or fail a checksum."""


class FileFacts(NamedTuple):
    """What is recorded of the file of a clip's array."""

    bytes: int
    """Its size."""
    crc32c: int
    """CRC-32C of the decoded values, in C order and little-endian."""
    table_crc32c: int
    """CRC-32C of the table of its chunks, by which each chunk is known for this clip's."""


class _Chunk(NamedTuple):
    offset: int
    size: int
    """With its own checksum behind it."""
    crc32c: int


def decode_clip(data: bytes | memoryview, spec: ArraySpec, facts: FileFacts) -> np.ndarray:
    """The values of a clip, from all bytes of its file; `DamagedFile` unless they are whole."""
    return read_clip(FetchedFile(data), spec, facts)


def read_clip(file: OpenFile, spec: ArraySpec, facts: FileFacts) -> np.ndarray:
    """The values of a clip, from its open file, whose size is known.

    Checking their CRC-32C costs next to nothing: chunks that are not compressed carry theirs, and
    of others it is computed while they are in the processor's cache.
    """
    if file.size != facts.bytes:
        raise DamagedFile(f"it has {file.size} bytes instead of {facts.bytes}")
    values, crc32c = _read_chunks(file, spec, _read_table(file, spec, facts))
    if crc32c != facts.crc32c:
        raise DamagedFile("its values fail the clip's checksum")
    return values


def read_part(
    place: Place, path: str, spec: ArraySpec, facts: FileFacts, start: int, stop: int
) -> np.ndarray:
    """Entries `start` to `stop` of a clip's leading axis.

    Over a network these are two requests: the table of the chunks, and the chunks that are needed.

    Args:
        place: where the file lies.
        path: the file, relative to the place.
        spec: of the array.
        facts: what is recorded of the file.
        start: the first entry, from 0.
        stop: the entry after the last one, more than `start`.
    """
    if not 0 <= start < stop <= spec.shape[0]:
        raise ValueError(f"entries {start} to {stop} asked of {spec.shape[0]}")
    first, last = start // spec.chunk_length, -(-stop // spec.chunk_length)
    with place.open(path, facts.bytes - _tail_bytes(spec.num_chunks), facts.bytes) as file:
        if file.size not in (None, facts.bytes):
            raise DamagedFile(f"it has {file.size} bytes instead of {facts.bytes}")
        chunks = _read_table(file, spec, facts)[first:last]
        values = _read_chunks(file, spec, chunks)[0] if file.size is not None else None
    if values is None:
        begin = min(chunk.offset for chunk in chunks)
        end = max(chunk.offset + chunk.size for chunk in chunks)
        with place.open(path, begin, end) as file:
            values, _ = _read_chunks(file, spec, chunks)
    origin = first * spec.chunk_length
    return values[start - origin : stop - origin]


def write_chunk_table(path: Path, spec: ArraySpec) -> int:
    """Put the chunks' checksums before the end of a file that Zarr has written.

    Zarr's own table is at the very end, and says where the chunks lie; what is between them and it
    Zarr does not look at. Not atomic: the file is nobody's yet. Returns the table's CRC-32C.
    """
    pairs_bytes = _PAIR_BYTES * spec.num_chunks
    with naming(path), path.open("r+b") as file:
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
    """Least and most bytes that the file of a clip can have, however it is compressed."""
    num_chunks, num_bytes = spec.num_chunks, spec.num_bytes
    around = _CRC_BYTES * num_chunks + _tail_bytes(num_chunks)
    headers = _BLOSC_HEADER.size * num_chunks
    return around + min(headers, num_bytes), around + headers + num_bytes


def _tail_bytes(num_chunks: int) -> int:
    return (_CRC_BYTES + _PAIR_BYTES) * num_chunks + _CRC_BYTES


def _read_table(file: OpenFile, spec: ArraySpec, facts: FileFacts) -> list[_Chunk]:
    """The inner chunks in the order of the leading axis, known for those of this clip."""
    tail = np.empty(_tail_bytes(spec.num_chunks), np.uint8)
    end = facts.bytes - len(tail)
    if end < 0:
        raise DamagedFile(f"it has {facts.bytes} bytes, too few for a clip")
    _fill(file, end, [tail])
    table, pairs = tail[:-_CRC_BYTES], tail[_CRC_BYTES * spec.num_chunks : -_CRC_BYTES]
    _check(pairs, tail[-_CRC_BYTES:], "the table of its chunks")
    # Without the last four bytes: behind its own CRC every text has the same one.
    if google_crc32c.value(table) != facts.table_crc32c:
        raise DamagedFile("the table of its chunks is not the clip's")
    crcs = table[: len(table) - len(pairs)].view("<u4").tolist()
    places = pairs.view("<u8").tolist()
    chunks = [_Chunk(*chunk) for chunk in zip(places[::2], places[1::2], crcs, strict=True)]
    for chunk in chunks:
        if chunk.size <= _CRC_BYTES or chunk.offset + chunk.size > end:
            raise DamagedFile("the table of its chunks points outside it")
    return chunks


def _read_chunks(
    file: OpenFile, spec: ArraySpec, chunks: Sequence[_Chunk]
) -> tuple[np.ndarray, int]:
    shape = (len(chunks) * spec.chunk_length, *spec.shape[1:])
    values = np.empty(shape, spec.numpy_dtype.newbyteorder("<"))
    # [chunk, byte]: what a chunk decodes to is written where it belongs.
    decoded = values.reshape(len(chunks), -1).view(np.uint8)
    chunk_bytes = spec.num_bytes // spec.num_chunks
    crc = np.empty(_CRC_BYTES, np.uint8)
    packed = np.empty(max(chunk.size for chunk in chunks), np.uint8)
    joined = 0
    for number, (offset, whole_size, crc32c) in enumerate(chunks):
        size = whole_size - _CRC_BYTES
        if spec.compression == "none":
            if size != chunk_bytes:
                raise DamagedFile(f"chunk {number} has {size} bytes instead of {chunk_bytes}")
            _fill(file, offset, [decoded[number], crc])
            _check_chunk(decoded[number], crc, crc32c, number)
            joined = _joined_crc32c(joined, crc32c, chunk_bytes)
        else:
            _fill(file, offset, [packed[:size], crc])
            _check_chunk(packed[:size], crc, crc32c, number)
            _decompress(packed[:size], decoded[number], number)
            joined = google_crc32c.extend(joined, decoded[number])
    return values.astype(spec.numpy_dtype, copy=False), joined


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


def _joined_crc32c(first: int, second: int, second_bytes: int) -> int:
    """CRC-32C of two stretches of bytes one after the other, from that of each."""
    joined = second
    for bit, shifted in enumerate(_shifted_bits(second_bytes)):
        if first >> bit & 1:
            joined ^= shifted
    return joined


@lru_cache(maxsize=64)
def _shifted_bits(num_bytes: int) -> tuple[int, ...]:
    """What each bit of a CRC-32C becomes when so many more bytes follow, apart from their own.

    The CRC of what follows adds to it without carry, so that zeros can stand for any bytes.
    """
    zeros = np.zeros(num_bytes, np.uint8)
    of_zeros = google_crc32c.value(zeros)
    return tuple(google_crc32c.extend(1 << bit, zeros) ^ of_zeros for bit in range(32))


def _decompress(packed: np.ndarray, into: np.ndarray, number: int) -> None:
    # Blosc itself believes the sizes in its header.
    sizes = (
        _BLOSC_HEADER.unpack_from(packed.data) if len(packed) >= _BLOSC_HEADER.size else (0, 0, 0)
    )
    if (sizes[0], sizes[2]) != (len(into), len(packed)):
        raise DamagedFile(f"chunk {number} is not a compressed one of {len(into)} bytes")
    try:
        blosc.decompress(packed, into)
    except Exception as error:  # whatever it makes of bytes that are not its own
        raise DamagedFile(f"chunk {number} cannot be decompressed ({error})") from error
