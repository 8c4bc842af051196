"""One byte of a store changed at random: never misread, found by verify, repaired by repair."""

import random
import shutil
from pathlib import Path

import pytest

from cache_schema import CacheError, CorruptRecord, StoreReader, verify_store
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.faults.small_store import (
    SHARDS,
    assert_equals_the_clip,
    write_again,
    write_all,
)
from tests.cache_schema.made_stores import files_of

KEYS = sorted(key for keys in SHARDS.values() for key in keys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of which every later one is a copy."""
    return write_all(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def files(whole: Path) -> dict[str, list[Path]]:
    """The store's files by what they are, so that each kind is hit as often as the others."""
    return {
        "clips": [path for path in whole.glob("shards/*/*/c.*") if path.is_file()],
        "metadata": list(whole.glob("shards/**/zarr.json")),
        "records": list(whole.glob("commits/*.json")),
        "index": [whole / "index.npz"],
        "settings": [whole / "store.json"],
    }


def _read_all(store: Path) -> list[str]:
    """Keys of the clips that read; each is what was written, or an error was raised for it."""
    read = []
    try:
        reader = StoreReader(store)
        keys = list(reader.keys)
    except CacheError:
        return []
    assert keys == sorted(set(keys) & set(KEYS))
    for key in keys:
        try:
            assert_equals_the_clip(reader, key)
        except CacheError:
            continue
        read.append(key)
    return read


def test_a_changed_byte_is_never_misread_and_always_found_and_mended(
    flip: int, tmp_path: Path, whole: Path, files: dict[str, list[Path]]
) -> None:
    chance = random.Random(flip)
    kind = list(files)[flip % len(files)]
    path = chance.choice(files[kind])
    store = shutil.copytree(whole, tmp_path / whole.name)
    damaged = store / path.relative_to(whole)
    data = bytearray(path.read_bytes())
    # A bit, as memory and disks lose it, or a byte, as people do.
    data[chance.randrange(len(data))] ^= chance.choice([1 << chance.randrange(8), 0xFF])
    damaged.write_bytes(data)

    read = _read_all(store)

    try:
        found = verify_store(store).problems
    except CorruptRecord:
        assert kind == "settings"
        assert read == []
    else:
        assert found
        assert {problem.remedy for problem in found} == {"repair"}
        assert kind != "settings"
    assert damaged.read_bytes() == data
    if kind in ("metadata", "index"):
        assert read == KEYS

    report = repair_store(store)
    assert report.found
    assert report.quarantine is not None
    assert bytes(data) in files_of(report.quarantine).values()
    write_all(tmp_path)  # a record or store.json that was taken out
    assert repair_store(store).found == ()
    assert set(read) <= set(_read_all(store)) or kind == "records"
    write_again(store)
    assert _read_all(store) == KEYS
    assert verify_store(store).problems == ()
