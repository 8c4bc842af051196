"""Compressed arrays: same values and file names, fewer bytes, in the layout of Zarr's codec."""

import json
from dataclasses import replace
from pathlib import Path

import numcodecs.blosc
import numpy as np
import pytest
import zarr

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from tests.cache_schema.made_stores import files_of
from tests.fingerprints import fingerprint_of

PLAIN = StoreSettings(
    kind="gram_flow",
    arrays={
        "gram_flow": ArraySpec(
            dtype="float16", shape=(6, 30, 45, 49), dimension_names=("p", "h", "w", "k")
        ),
        "valid": ArraySpec(dtype="uint8", shape=(7,), dimension_names=("t",)),
    },
    values={"radius": 3},
)
PACKED = replace(
    PLAIN,
    arrays={
        **PLAIN.arrays,
        "gram_flow": replace(PLAIN.arrays["gram_flow"], compression="blosc-zstd-shuffle"),
    },
)


def _smooth(seed: int) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed).normal(size=(6, 30, 45, 49)).cumsum(axis=1)
    return {
        "gram_flow": (0.9 + noise / 1000).astype("float16"),
        "valid": np.ones(7, "uint8"),
    }


def _write(root: Path, settings: StoreSettings, shard: str = "00000") -> Path:
    writer = StoreWriter.open(root, settings, provenance={})
    with writer.shard(shard, source="x.tar") as out:
        for i in range(3):
            out.add(f"{shard}/{i}", _smooth(i), fingerprint=fingerprint_of(f"{shard}/{i}"))
        out.commit()
    return writer.path


def test_the_name_is_the_same_and_the_values_are_with_fewer_bytes(tmp_path: Path) -> None:
    assert PLAIN.hash == PACKED.hash
    assert PLAIN != PACKED
    plain = StoreReader(_write(tmp_path / "plain", PLAIN))
    packed = StoreReader(_write(tmp_path / "packed", PACKED))
    assert packed.name == plain.name
    assert packed.num_bytes < 0.9 * plain.num_bytes
    for i in range(3):
        for name, values in _smooth(i).items():
            np.testing.assert_array_equal(packed.read(f"00000/{i}")[name], values)
            np.testing.assert_array_equal(plain.read(f"00000/{i}")[name], values)
        stored = packed.record(f"00000/{i}").arrays["gram_flow"].crc32c
        assert stored == plain.record(f"00000/{i}").arrays["gram_flow"].crc32c


def test_store_json_says_which_array_is_compressed(tmp_path: Path) -> None:
    store = _write(tmp_path, PACKED)
    arrays = json.loads((store / "store.json").read_bytes())["arrays"]
    assert arrays["gram_flow"]["compression"] == "blosc-zstd-shuffle"
    assert arrays["valid"]["compression"] == "none"
    assert StoreReader(store).settings == PACKED


def test_chunks_are_blosc_of_zstandard_one_behind_a_byte_shuffle(tmp_path: Path) -> None:
    store = _write(tmp_path, PACKED)
    array = zarr.open_array(str(store / "shards/00000"), path="gram_flow", mode="r")
    np.testing.assert_array_equal(array[1], _smooth(1)["gram_flow"])
    (sharding,) = json.loads((store / "shards/00000/gram_flow/zarr.json").read_bytes())["codecs"]
    assert sharding["configuration"]["codecs"] == [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {
            "name": "blosc",
            "configuration": {
                "typesize": 2,
                "cname": "zstd",
                "clevel": 1,
                "shuffle": "shuffle",
                "blocksize": 2**19,
            },
        },
        {"name": "crc32c"},
    ]
    data = (store / "shards/00000/gram_flow/c.1.0.0.0.0").read_bytes()
    values = _smooth(1)["gram_flow"][: PACKED.arrays["gram_flow"].chunk_length]
    codec = numcodecs.Blosc(
        cname="zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE, blocksize=2**19
    )
    expected = codec.encode(values)
    assert data.startswith(expected)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    assert files_of(_write(tmp_path / "a", PACKED)) == files_of(_write(tmp_path / "b", PACKED))


@pytest.mark.parametrize("first", [PLAIN, PACKED])
def test_a_store_goes_on_with_the_compression_it_has(tmp_path: Path, first: StoreSettings) -> None:
    other = PACKED if first is PLAIN else PLAIN
    _write(tmp_path, first)
    writer = StoreWriter.open(tmp_path, other, provenance={})
    assert writer.settings == first
    store = _write(tmp_path, other, shard="00001")
    reader = StoreReader(store)
    assert reader.settings == first
    np.testing.assert_array_equal(reader.read("00001/2")["gram_flow"], _smooth(2)["gram_flow"])


def test_a_lost_store_json_is_written_again_with_the_compression_on_disk(tmp_path: Path) -> None:
    store = _write(tmp_path, PACKED)
    before = files_of(store)
    (store / "store.json").unlink()
    StoreWriter.open(tmp_path, PLAIN, provenance={})
    assert files_of(store) == before


def test_staged_clips_that_are_compressed_are_adopted(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole", PACKED)
    writer = StoreWriter.open(tmp_path / "killed", PACKED, provenance={})
    with writer.shard("00000", source="x.tar") as out:
        out.add("00000/0", _smooth(0), fingerprint=fingerprint_of("00000/0"))
        out.add("00000/1", _smooth(1), fingerprint=fingerprint_of("00000/1"))
    (chunk,) = writer.path.glob(".staging/00000/*/staged/shard/gram_flow/c.1.0.0.0.0")
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 1
    chunk.write_bytes(data)
    with writer.shard("00000", source="x.tar") as out:
        assert [out.has(f"00000/{i}") for i in range(3)] == [True, False, False]
        out.add("00000/1", _smooth(1), fingerprint=fingerprint_of("00000/1"))
        out.add("00000/2", _smooth(2), fingerprint=fingerprint_of("00000/2"))
        out.commit()
    assert files_of(writer.path) == files_of(whole)


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(ValueError, match="compression is 'lzma'; it must be one of none, blosc"):
        replace(PLAIN.arrays["valid"], compression="lzma")  # type: ignore[arg-type]
