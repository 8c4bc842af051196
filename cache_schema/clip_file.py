"""Decoding one clip's file of one array, from its bytes to values; used by the reader.

The file is a Zarr v3 shard: inner chunks, each with a CRC-32C, and at the end where they lie. It is
decoded here and not by Zarr, which takes bytes that are not there for fill values, reads a file in
several steps and copies what it reads. README.md describes the bytes.
"""

import math
import struct
from collections.abc import Sequence
from functools import lru_cache

import google_crc32c
import numpy as np
from numcodecs import blosc

from cache_schema.places import FetchedFile, OpenFile, Place
from cache_schema.settings import ArraySpec

# Threads of its own would neither survive a fork nor help: readers run side by side. Zarr's codec
# does the same.
blosc.use_threads = False

_CRC_BYTES = 4
_ENTRY_BYTES = 16
_BLOSC_HEADER = struct.Struct("<4x3I")
"""Bytes when decoded, bytes of a block, bytes as they are."""


class DamagedFile(ValueError):  # noqa: N818 (says what was found, like the other errors)
    """The bytes are not a clip's of that specification, or fail a checksum."""


def decode_clip(data: bytes | memoryview, spec: ArraySpec) -> np.ndarray:
    """The values of a clip, from all bytes of its file; `DamagedFile` unless they are whole."""
    return read_clip(FetchedFile(data), spec)


def read_clip(file: OpenFile, spec: ArraySpec) -> np.ndarray:
    """The values of a clip, from its open file, whose size is known."""
    return read_clip_and_crc32c(file, spec)[0]


def read_clip_and_crc32c(file: OpenFile, spec: ArraySpec) -> tuple[np.ndarray, int]:
    """As `read_clip`, with the CRC-32C of the values in C order and little-endian.

    It costs next to nothing: chunks that are not compressed carry theirs, and of others it is
    computed while they are in the processor's cache.
    """
    assert file.size is not None
    return _read_chunks(file, spec, _chunk_places(file, file.size, spec))


def read_part(
    place: Place, path: str, file_bytes: int, spec: ArraySpec, start: int, stop: int
) -> np.ndarray:
    """Entries `start` to `stop` of a clip's leading axis.

    Over a network these are two requests: where the chunks lie, and the chunks that are needed.

    Args:
        place: where the file lies.
        path: the file, relative to the place.
        file_bytes: its size, as its record gives it.
        spec: of the array.
        start: the first entry, from 0.
        stop: the entry after the last one, more than `start`.
    """
    if not 0 <= start < stop <= spec.shape[0]:
        raise ValueError(f"entries {start} to {stop} asked of {spec.shape[0]}")
    first, last = start // spec.chunk_length, -(-stop // spec.chunk_length)
    with place.open(path, file_bytes - _footer_bytes(spec), file_bytes) as file:
        if file.size not in (None, file_bytes):
            raise DamagedFile(f"it has {file.size} bytes instead of {file_bytes}")
        chunks = _chunk_places(file, file_bytes, spec)[first:last]
    begin = min(offset for offset, _ in chunks)
    end = max(offset + size for offset, size in chunks)
    with place.open(path, begin, end) as file:
        values, _ = _read_chunks(file, spec, chunks)
    origin = first * spec.chunk_length
    return values[start - origin : stop - origin]


def file_bytes_range(spec: ArraySpec) -> tuple[int, int]:
    """Least and most bytes that the file of a clip can have, however it is compressed."""
    around = _CRC_BYTES * spec.num_chunks + _footer_bytes(spec)
    headers = _BLOSC_HEADER.size * spec.num_chunks
    return around + min(headers, spec.num_bytes), around + headers + spec.num_bytes


def _footer_bytes(spec: ArraySpec) -> int:
    return _ENTRY_BYTES * spec.num_chunks + _CRC_BYTES


def _chunk_places(file: OpenFile, size: int, spec: ArraySpec) -> list[tuple[int, int]]:
    """Offset and size of every inner chunk with its checksum, in the order of the leading axis."""
    footer = np.empty(_footer_bytes(spec), np.uint8)
    end = size - len(footer)
    if end < 0:
        raise DamagedFile(f"it has {size} bytes, too few for a clip")
    _fill(file, end, [footer])
    _check(footer[:-_CRC_BYTES], footer[-_CRC_BYTES:], "the table of its chunks")
    places = footer[:-_CRC_BYTES].view("<u8").reshape(-1, 2).tolist()
    for offset, length in places:
        if length <= _CRC_BYTES or offset + length > end:
            raise DamagedFile("the table of its chunks points outside it")
    return [(offset, length) for offset, length in places]


def _read_chunks(
    file: OpenFile, spec: ArraySpec, chunks: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, int]:
    shape = (len(chunks) * spec.chunk_length, *spec.shape[1:])
    values = np.empty(shape, spec.numpy_dtype.newbyteorder("<"))
    # [chunk, byte]: what a chunk decodes to is written where it belongs.
    decoded = values.reshape(len(chunks), -1).view(np.uint8)
    chunk_bytes = spec.chunk_length * math.prod(spec.shape[1:]) * spec.numpy_dtype.itemsize
    crc = np.empty(_CRC_BYTES, np.uint8)
    packed = np.empty(max(length for _, length in chunks), np.uint8)
    joined = 0
    for number, (offset, length) in enumerate(chunks):
        size = length - _CRC_BYTES
        if spec.compression == "none":
            if size != chunk_bytes:
                raise DamagedFile(f"chunk {number} has {size} bytes instead of {chunk_bytes}")
            _fill(file, offset, [decoded[number], crc])
            own = _check(decoded[number], crc, f"chunk {number}")
            joined = _joined_crc32c(joined, own, chunk_bytes)
        else:
            _fill(file, offset, [packed[:size], crc])
            _check(packed[:size], crc, f"chunk {number}")
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
