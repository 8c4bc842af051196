"""A reader written from the specification alone reads what was written."""

import ast
from pathlib import Path

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from cache_schema.maintenance.drop import drop_clips
from cache_schema.schema import Compression
from tests.cache_schema import independent_reader
from tests.cache_schema.independent_reader import (
    IndependentReader,
    clips_of_index,
    crc32c,
    read_index,
    shards_of_index,
    skipped_of_index,
)
from tests.fingerprints import fingerprint_of

SHARDS = {
    "00000": ["walk/0000", "läuft", "ｅｎｄ\U0001f40e", "walk/0001"],
    "00001": ["run/0000"],
    "00002": [],
    "00000-retry1": ["a clip made later"],
}


def _arrays(seed: int, settings: StoreSettings) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=spec.shape) * 50).astype(spec.dtype)
        for name, spec in settings.arrays.items()
    }


@pytest.fixture(scope="module")
def settings() -> StoreSettings:
    packed: Compression = "blosc-zstd-shuffle"
    return StoreSettings(
        kind="gram_flow",
        arrays={
            "plain": ArraySpec(dtype="float16", shape=(4, 2, 3), dimension_names=("t", "h", "w")),
            "packed": ArraySpec(
                dtype="float16",
                shape=(6, 20, 9),
                dimension_names=("p", "n", "k"),
                compression=packed,
            ),
            "codes": ArraySpec(
                dtype="int8", shape=(5, 7), dimension_names=("q", "c"), compression=packed
            ),
            # Two inner chunks, with and without compression.
            "wide": ArraySpec(dtype="uint8", shape=(2, 2**19 + 1), dimension_names=("s", "x")),
            "wide_packed": ArraySpec(
                dtype="float64",
                shape=(2, 2**16 + 1),
                dimension_names=("s", "y"),
                compression=packed,
            ),
            "count": ArraySpec(dtype="int64", shape=(1,), dimension_names=("one",)),
        },
        values={"fps": 8.0, "frames": 8, "who": "Zoë", "none": None, "list": [1, 1e-7, True]},
    )


@pytest.fixture(scope="module")
def written(settings: StoreSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a clip of the first shard was dropped afterwards."""
    writer = StoreWriter.open(tmp_path_factory.mktemp("c"), settings, provenance={"run": "é"})
    seed = 0
    for name, keys in SHARDS.items():
        with writer.shard(name, source=f"{name}.tar") as shard:
            for key in keys:
                shard.add(
                    key, _arrays(seed, settings), {"seed": seed}, fingerprint=fingerprint_of(key)
                )
                seed += 1
            shard.skip(
                f"{name} skipped",
                "too_short",
                "12 frames, 49 needed",
                fingerprint=fingerprint_of(f"{name} skipped"),
            )
            shard.commit()
    drop_clips(writer.path, ["läuft"], detail="unscharf")
    return writer.path


def test_the_checksum_is_castagnolis() -> None:
    assert f"{crc32c(b'123456789'):08x}" == "e3069283"


def test_it_shares_nothing_with_the_package() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text("utf-8"))
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(str(name).startswith(("cache_schema", "zarr", "stages")) for name in imported)


@pytest.mark.timeout(300)
def test_it_finds_every_clip_as_it_was_written(written: Path, settings: StoreSettings) -> None:
    found = IndependentReader(written)
    found.check_metadata()
    reader = StoreReader(written)
    expected = [key for keys in SHARDS.values() for key in keys if key != "läuft"]
    assert set(found.clips) == set(reader.keys) == set(expected)
    for key in expected:
        shard, clip = found.clips[key]
        assert clip["attributes"] == reader.record(key).attributes
        assert clip["fingerprint"] == reader.record(key).fingerprint == fingerprint_of(key)
        wanted = _arrays(clip["attributes"]["seed"], settings)
        theirs = reader.read(key)
        for name, values in found.read(key).items():
            assert values.dtype == settings.arrays[name].dtype
            np.testing.assert_array_equal(values, wanted[name])
            np.testing.assert_array_equal(values, theirs[name])
        assert reader.shard_of(key) == shard
    assert (found.group("00000").name, found.records["00000"]["generation"]) == ("00000", 1)
    assert found.records["00000"]["skipped"][1] == {
        "key": "läuft",
        "reason": "dropped",
        "detail": "unscharf",
        "fingerprint": fingerprint_of("läuft"),
    }


def test_the_index_says_what_the_commit_records_say(written: Path) -> None:
    found = IndependentReader(written)
    columns = read_index(written / "index.npz")
    assert columns["settings_hash"].tobytes().decode() == found.store["settings_hash"]
    assert columns["store.crc32c"].tolist() == [int(found.store["crc32c"], 16)]
    assert clips_of_index(columns, found.store["arrays"]) == {
        key: (
            found.group(shard).name,
            clip["index"],
            clip["fingerprint"],
            {
                name: (array["bytes"], array["crc32c"], array["table_crc32c"])
                for name, array in clip["arrays"].items()
            },
        )
        for key, (shard, clip) in found.clips.items()
    }
    assert shards_of_index(columns) == {
        shard: (record["source"], record["generation"], record["crc32c"])
        for shard, record in found.records.items()
    }
    assert skipped_of_index(columns) == [
        (shard, clip["key"], clip["reason"], clip["detail"], clip["fingerprint"])
        for shard, record in sorted(found.records.items())
        for clip in record["skipped"]
    ]
