"""Partial reads detect files of equal size that were exchanged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_schema import ArraySpec, CorruptClip, StoreReader, StoreSettings, StoreWriter
from cache_schema import schema as settings_module
from tests.cache_schema.servers import serving
from tests.fingerprints import fingerprint_of

SHARDS = {"0": ("a", "b"), "1": ("c", "d")}


def _values(key: str) -> np.ndarray:
    random = np.random.default_rng(ord(key))
    return random.integers(0, 256, (6, 4, 8), np.uint8)


@pytest.fixture(params=["none", "blosc-zstd-shuffle"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clips of three inner chunks; they are not compressible, so that their sizes are equal."""
    monkeypatch.setattr(settings_module, "MAX_SHARED_CHUNK_BYTES", 64)
    settings_module._chunk_length.cache_clear()
    request.addfinalizer(settings_module._chunk_length.cache_clear)
    spec = ArraySpec(
        dtype="uint8",
        shape=(6, 4, 8),
        dimension_names=("t", "h", "w"),
        compression=request.param,
    )
    settings = StoreSettings(kind="masks", arrays={"forward": spec}, values={})
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    for name, keys in SHARDS.items():
        with writer.shard(name, source=name) as shard:
            for key in keys:
                shard.add(key, {"forward": _values(key)}, fingerprint=fingerprint_of(key))
            shard.commit()
    writer.write_index()
    return writer.path


def _chunk(store: Path, shard: str, index: int) -> Path:
    return store / "shards" / shard / "forward" / f"c.{index}.0.0.0"


def _swap(first: Path, second: Path) -> None:
    assert first.stat().st_size == second.stat().st_size
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def _swap_within(store: Path) -> None:
    _swap(_chunk(store, "0", 0), _chunk(store, "0", 1))


def _swap_between(store: Path) -> None:
    _swap(_chunk(store, "0", 0), _chunk(store, "1", 1))


def _swap_groups(store: Path) -> None:
    (store / "shards" / "0").rename(store / "shards" / "x")
    (store / "shards" / "1").rename(store / "shards" / "0")
    (store / "shards" / "x").rename(store / "shards" / "1")


def _move_a_chunk(store: Path) -> None:
    """One inner chunk with its own checksum, and no more, from another clip's file."""
    path = _chunk(store, "0", 0)
    data, other = path.read_bytes(), _chunk(store, "0", 1).read_bytes()
    size = (len(data) - 3 * 20 - 4) // 3
    path.write_bytes(other[:size] + data[size:])


@pytest.mark.parametrize("behind_a_url", [False, True])
@pytest.mark.parametrize("damage", [_swap_within, _swap_between, _swap_groups, _move_a_chunk])
def test_a_part_of_an_exchanged_file_is_refused(
    store: Path, damage: Callable[[Path], None], behind_a_url: bool
) -> None:
    damage(store)
    with serving(store.parent) as server:
        reader = StoreReader(f"{server.url}/{store.name}" if behind_a_url else store)
        refused = set()
        for key in reader.keys:
            for start, stop in ((0, 2), (1, 3), (0, 6), (5, 6)):
                try:
                    part = reader.read_part(key, "forward", start, stop)
                except CorruptClip:
                    refused.add((key, start))
                    continue
                np.testing.assert_array_equal(part, _values(key)[start:stop])
    assert ("a", 0) in refused


def test_a_part_over_a_network_is_two_requests(store: Path) -> None:
    with serving(store.parent) as server:
        reader = StoreReader(f"{server.url}/{store.name}")
        assert len(reader) == 4
        del server.requests[:]
        reader.read_part("a", "forward", 2, 4)
        assert len(server.requests) == 2
