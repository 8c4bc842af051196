"""Decoding of a clip's file: equal to Zarr's own reading; every kind of damage is detected."""

import itertools
import struct
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numcodecs import blosc

from cache_schema import ArraySpec, StoreSettings
from cache_schema import schema as settings_module
from cache_schema.schema import DTYPES
from cache_schema.storage import FetchedFile, LocalStorage
from cache_schema.zarr_shard import (
    DamagedFile,
    FileFacts,
    chunk_path,
    create_group,
    decode_clip,
    read_part,
    write_chunk_table,
)

COMPRESSIONS = ("none", "blosc-zstd-shuffle")


class Fetched:
    """A place as it is over a network: every opening is one request, which is counted."""

    location = "memory"

    def __init__(self, folder: Path) -> None:
        self._local = LocalStorage(folder)
        self.asked: list[tuple[int, int | None]] = []

    def open(self, path: str, start: int = 0, stop: int | None = None) -> FetchedFile:
        self.asked.append((start, stop))
        if stop is None:
            return FetchedFile(self._local.read(path))
        return FetchedFile(self._local.read_range(path, start, stop), offset=start, whole=False)


def _written(folder: Path, spec: ArraySpec, *clips: np.ndarray) -> Any:
    """Write clips by Zarr and return Zarr's array over them."""
    group = create_group(folder, StoreSettings(kind="k", arrays={"a": spec}, values={}), len(clips))
    for index, clip in enumerate(clips):
        group["a"].write(index, clip)
        write_chunk_table(folder / chunk_path("a", spec, index), spec)
    return zarr.open_array(str(folder), path="a", mode="r")


def _facts(stored: bytes, spec: ArraySpec, values: np.ndarray) -> FileFacts:
    """What a record would say of a file, computed from its bytes here."""
    table = stored[-20 * (spec.shape[0] // spec.chunk_length) - 4 : -4]
    little = values.astype(values.dtype.newbyteorder("<"))
    return FileFacts(len(stored), google_crc32c.value(little.tobytes()), google_crc32c.value(table))


def _values(spec: ArraySpec, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if spec.numpy_dtype.kind == "f":
        return random.normal(size=spec.shape).astype(spec.dtype)
    limits = np.iinfo(spec.dtype)
    return random.integers(limits.min, limits.max, spec.shape, spec.dtype, endpoint=True)


@st.composite
def specs(draw: st.DrawFn) -> ArraySpec:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return ArraySpec(
        dtype=draw(st.sampled_from(DTYPES)),
        shape=tuple(shape),
        dimension_names=tuple("abcd"[: len(shape)]),
        compression=draw(st.sampled_from(COMPRESSIONS)),
    )


@hypothesis_settings(max_examples=60)
@given(
    spec=specs(),
    chunk_bytes=st.sampled_from([1, 40, 200, 2**20]),
    constant=st.booleans(),
    data=st.data(),
)
def test_decoding_equals_zarrs_own_reading(
    spec: ArraySpec, chunk_bytes: int, constant: bool, data: st.DataObject
) -> None:
    with (
        mock.patch.object(settings_module, "MAX_SHARED_CHUNK_BYTES", chunk_bytes),
        tempfile.TemporaryDirectory() as name,
    ):
        clips = [_values(spec, seed) * (not constant) for seed in range(2)]
        array = _written(Path(name), spec, *clips)
        for index, clip in enumerate(clips):
            path = chunk_path("a", spec, index)
            stored = (Path(name) / path).read_bytes()
            facts = _facts(stored, spec, clip)
            found = decode_clip(stored, spec, facts)
            assert found.dtype == spec.numpy_dtype
            assert found.flags.c_contiguous
            assert found.flags.writeable
            np.testing.assert_array_equal(found, array[index], strict=True)
            np.testing.assert_array_equal(found, clip)
            for wrong in (facts._replace(crc32c=1), facts._replace(table_crc32c=1)):
                with pytest.raises(DamagedFile):
                    decode_clip(stored, spec, wrong)
            start = data.draw(st.integers(0, spec.shape[0] - 1))
            stop = data.draw(st.integers(start + 1, spec.shape[0]))
            for place in (LocalStorage(Path(name)), Fetched(Path(name))):
                part = read_part(place, path, spec, facts, start, stop)  # type: ignore[arg-type]
                np.testing.assert_array_equal(part, clip[start:stop], strict=True)


@pytest.fixture(params=COMPRESSIONS)
def spec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ArraySpec:
    """Of three inner chunks of two entries."""
    monkeypatch.setattr(settings_module, "MAX_SHARED_CHUNK_BYTES", 64)
    return ArraySpec(
        dtype="float16", shape=(6, 4, 4), dimension_names=("t", "h", "w"), compression=request.param
    )


@pytest.fixture
def stored(tmp_path: Path, spec: ArraySpec) -> bytes:
    """The bytes of a clip's file, as Zarr wrote them to `tmp_path`."""
    _written(tmp_path, spec, _values(spec, 0))
    return (tmp_path / chunk_path("a", spec, 0)).read_bytes()


@pytest.fixture
def facts(stored: bytes, spec: ArraySpec) -> FileFacts:
    """What a record says of it."""
    return _facts(stored, spec, _values(spec, 0))


def test_every_flipped_bit_is_found(stored: bytes, spec: ArraySpec, facts: FileFacts) -> None:
    for position, bit in itertools.product(range(len(stored)), range(8)):
        data = bytearray(stored)
        data[position] ^= 1 << bit
        with pytest.raises(DamagedFile):
            decode_clip(bytes(data), spec, facts)


def test_every_truncation_is_found(stored: bytes, spec: ArraySpec, facts: FileFacts) -> None:
    for size in range(len(stored)):
        with pytest.raises(DamagedFile):
            decode_clip(stored[:size], spec, facts)


def test_zeroed_tails_and_heads_are_found(stored: bytes, spec: ArraySpec, facts: FileFacts) -> None:
    for size in range(1, len(stored)):
        for data in (stored[:size] + bytes(len(stored) - size), bytes(size) + stored[size:]):
            if data != stored:
                with pytest.raises(DamagedFile):
                    decode_clip(data, spec, facts)


def test_parts_of_damaged_files_are_refused(
    tmp_path: Path, stored: bytes, spec: ArraySpec, facts: FileFacts
) -> None:
    path = chunk_path("a", spec, 0)
    file = tmp_path / path
    size = len(stored)
    for place in (LocalStorage(tmp_path), Fetched(tmp_path)):
        for end in (0, 1, 40, size // 2, size - 53, size - 1):
            file.write_bytes(stored[:end])
            with pytest.raises(DamagedFile):
                read_part(place, path, spec, facts, 2, 4)  # type: ignore[arg-type]
        for position in range(size):
            data = bytearray(stored)
            data[position] ^= 1
            file.write_bytes(data)
            try:
                found = read_part(place, path, spec, facts, 2, 4)  # type: ignore[arg-type]
            except DamagedFile:
                continue
            # The flipped bit lies in another chunk.
            np.testing.assert_array_equal(found, _values(spec, 0)[2:4])


def test_a_part_is_two_requests_for_little_more_than_its_bytes(
    tmp_path: Path, stored: bytes, spec: ArraySpec, facts: FileFacts
) -> None:
    place = Fetched(tmp_path)
    read_part(place, chunk_path("a", spec, 0), spec, facts, 2, 4)  # type: ignore[arg-type]
    (first, last), (begin, end) = place.asked
    assert (first, last) == (len(stored) - 3 * 20 - 4, len(stored))
    assert end is not None
    assert end - begin < len(stored) // 2


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 2), (5, 7)])
def test_entries_that_are_not_there_are_refused(
    tmp_path: Path, spec: ArraySpec, facts: FileFacts, start: int, stop: int
) -> None:
    with pytest.raises(ValueError, match="entries"):
        read_part(LocalStorage(tmp_path), chunk_path("a", spec, 0), spec, facts, start, stop)


def _sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _file(chunks: list[bytes], *, empty: int | None = None) -> bytes:
    """A file of these chunks whose checksums all fit; one may be said not to be there."""
    body, table, crcs = b"", b"", b""
    for number, chunk in enumerate(chunks):
        place = (len(body), len(chunk) + 4) if number != empty else (2**64 - 1, 2**64 - 1)
        table += struct.pack("<QQ", *place)
        body += _sealed(chunk)
        crcs += _sealed(chunk)[-4:]
    return body + crcs + _sealed(table)


def _decode(data: bytes, spec: ArraySpec, values: np.ndarray | None = None) -> np.ndarray:
    """With a record that says just that of the file."""
    if values is None:
        values = np.zeros(spec.shape, spec.dtype)
    return decode_clip(data, spec, _facts(data, spec, values))


def test_chunks_that_zarr_would_fill_in_are_refused(stored: bytes, spec: ArraySpec) -> None:
    chunks = [bytes(64)] * 3
    if spec.compression != "none":
        chunks = [blosc.compress(chunk, b"zstd", 1) for chunk in chunks]
    assert not _decode(_file(chunks), spec).any()
    with pytest.raises(DamagedFile, match="outside"):
        _decode(_file(chunks, empty=1), spec)


@pytest.mark.parametrize("length", [0, 1, 12, 62, 66, 128])
def test_chunks_of_another_length_are_refused(spec: ArraySpec, length: int) -> None:
    chunk = bytes(length)
    if spec.compression != "none":
        chunk = blosc.compress(chunk, b"zstd", 1)
    with pytest.raises(DamagedFile):
        _decode(_file([bytes(chunk)] * 3), spec)


def test_compressed_chunks_that_lie_about_themselves_are_refused(spec: ArraySpec) -> None:
    if spec.compression == "none":
        return
    good = bytes(blosc.compress(bytes(range(64)), b"zstd", 1))
    values = np.frombuffer(bytes(range(64)) * 3, np.float16).reshape(spec.shape)
    assert _decode(_file([good] * 3), spec, values).any()
    for bad in (good[:-1], good + b"\0", good[:20], good[:15], b"", bytes(len(good))):
        with pytest.raises(DamagedFile):
            _decode(_file([good, bad, good]), spec, values)


def test_incompressible_values_are_decoded_too(tmp_path: Path) -> None:
    spec = ArraySpec(
        dtype="uint8",
        shape=(3, 70_001),
        dimension_names=("t", "n"),
        compression="blosc-zstd-shuffle",
    )
    values = _values(spec, 1)
    _written(tmp_path, spec, values)
    stored = (tmp_path / chunk_path("a", spec, 0)).read_bytes()
    assert len(stored) > values.nbytes
    np.testing.assert_array_equal(decode_clip(stored, spec, _facts(stored, spec, values)), values)


def test_a_chunk_of_another_clip_is_refused_in_a_part(
    tmp_path: Path, stored: bytes, spec: ArraySpec, facts: FileFacts
) -> None:
    """Each alone is right: the chunk with its checksum, the table with its own."""
    path = chunk_path("a", spec, 0)
    group = tmp_path / "other"
    _written(group, spec, _values(spec, 1))
    other = (group / path).read_bytes()
    tail = 3 * 20 + 4
    swapped = [other]
    if len(other) == len(stored):  # else the sizes tell
        swapped += [other[:-tail] + stored[-tail:], stored[:-tail] + other[-tail:]]
        swapped += [other[:-64] + stored[-64:], stored[:-64] + other[-64:]]
    for data in swapped:
        (tmp_path / path).write_bytes(data)
        for place in (LocalStorage(tmp_path), Fetched(tmp_path)):
            with pytest.raises(DamagedFile):
                read_part(place, path, spec, facts, 2, 4)  # type: ignore[arg-type]


def test_zarr_still_reads_a_file_with_the_table(tmp_path: Path, spec: ArraySpec) -> None:
    values = _values(spec, 3)
    array = _written(tmp_path, spec, values)
    np.testing.assert_array_equal(array[0], values, strict=True)
    np.testing.assert_array_equal(array[0, 2:4], values[2:4], strict=True)
