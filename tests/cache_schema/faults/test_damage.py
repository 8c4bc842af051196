"""Damage of every kind to committed shards: detected by the reader and by verify_store."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema import (
    CacheError,
    CorruptClip,
    CorruptRecord,
    StoreReader,
    StoreWriter,
    UnknownSchemaVersion,
    verify_store,
)
from tests.cache_schema.made_stores import SETTINGS, commit_twins
from tests.cache_schema.tampering import tamper

CHUNK = "shards/00000/features/c.1.0.0.0.0"


def _assert_found(store: Path, *, by_size: bool) -> None:
    with pytest.raises(CorruptClip) as error:
        StoreReader(store).read("a1")
    message = str(error.value)
    assert f"'a1' in shard '00000' of {store}" in message
    assert CHUNK in message
    assert (error.value.remedy, error.value.subject) == ("repair", str(store))
    assert [(p.shard, p.key) for p in verify_store(store).problems] == [("00000", "a1")]
    assert bool(verify_store(store, fast=True).problems) == by_size
    others = StoreReader(store)
    for key in ("a0", "a2", "b0"):
        others.read(key)


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bits_are_found(store: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray((store / CHUNK).read_bytes())
    data[len(data) * seed // 8 + chance.randrange(len(data) // 8)] ^= 1 << chance.randrange(8)
    (store / CHUNK).write_bytes(data)
    _assert_found(store, by_size=False)


@pytest.mark.parametrize("size", [0, 1, 40, 100, -20, -1])
def test_truncated_files_are_found(store: Path, size: int) -> None:
    (store / CHUNK).write_bytes((store / CHUNK).read_bytes()[:size])
    _assert_found(store, by_size=True)


def test_longer_files_are_found(store: Path) -> None:
    (store / CHUNK).write_bytes((store / CHUNK).read_bytes() + b"\0")
    _assert_found(store, by_size=True)


def test_zeroed_tails_are_found(store: Path) -> None:
    data = (store / CHUNK).read_bytes()
    (store / CHUNK).write_bytes(data[:40] + bytes(len(data) - 40))
    _assert_found(store, by_size=False)


def test_deleted_files_are_found(store: Path) -> None:
    (store / CHUNK).unlink()
    _assert_found(store, by_size=True)


def test_a_file_that_became_a_folder_is_found(store: Path) -> None:
    (store / CHUNK).unlink()
    (store / CHUNK).mkdir()
    with pytest.raises(CorruptClip):
        StoreReader(store).read("a1")


def test_files_of_other_clips_are_found(store: Path) -> None:
    # Every checksum of Zarr itself is right here, and so is the size.
    (store / CHUNK).write_bytes((store / CHUNK.replace("/c.1.", "/c.0.")).read_bytes())
    _assert_found(store, by_size=False)


def test_damage_after_the_first_read_is_found(store: Path) -> None:
    reader = StoreReader(store)
    reader.read("a1")
    data = bytearray((store / CHUNK).read_bytes())
    data[20] ^= 8
    (store / CHUNK).write_bytes(data)
    with pytest.raises(CorruptClip, match="checksum"):
        reader.read("a1")


@pytest.mark.parametrize("path", ["zarr.json", "features/zarr.json"])
@pytest.mark.parametrize("damage", ["change", "delete"])
def test_damaged_metadata_is_found(store: Path, path: str, damage: str) -> None:
    file = store / "shards" / "00000" / path
    if damage == "change":
        file.write_bytes(file.read_bytes().replace(b'"attributes": {}', b'"attributes":{ }'))
    else:
        file.unlink()
    (problem,) = verify_store(store).problems
    assert (problem.shard, problem.key, problem.remedy) == ("00000", None, "repair")
    assert path in problem.what


def test_a_deleted_shard_is_found(store: Path) -> None:
    (store / "shards" / "00001").rename(store / "gone")
    with pytest.raises(CorruptClip):
        StoreReader(store).read("b0")
    for fast in (True, False):
        found = {p.key for p in verify_store(store, fast=fast).problems}
        assert found == {None, "b0", "b1"}


def test_foreign_files_in_a_shard_are_reported(store: Path) -> None:
    (store / "shards" / "00001" / "notes.txt").write_text("hello")
    (problem,) = verify_store(store).problems
    assert "notes.txt" in problem.what


def test_a_damaged_record_is_never_believed(store: Path) -> None:
    path = store / "commits" / "00000.json"
    good = path.read_bytes()
    told = r"commit record .*00000\.json is "
    chance = random.Random(0)
    for _ in range(40):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CacheError):
            assert StoreReader(store).keys
    for size in (0, 1, len(good) // 2, len(good) - 3):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptRecord, match=told):
            assert StoreReader(store).keys
        assert [p.shard for p in verify_store(store).problems] == ["00000"]


def test_a_damaged_store_file_is_never_believed(store: Path) -> None:
    path = store / "store.json"
    good = path.read_bytes()
    chance = random.Random(0)
    for _ in range(40):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CacheError):
            StoreReader(store)
        with pytest.raises(CacheError):
            StoreWriter.open(store.parent, SETTINGS, provenance={})
    path.write_bytes(b"")
    with pytest.raises(CorruptRecord, match="not JSON"):
        verify_store(store)


@pytest.mark.parametrize(
    "escape",
    [
        "../../../../secret",
        "/etc/passwd",
        "features/../../00001/features/c.0.0.0.0.0",
        "features/c.0.0.0.0.0",
        "",
    ],
)
def test_a_record_that_points_elsewhere_is_refused(store: Path, escape: str) -> None:
    def point(record: dict[str, Any]) -> None:
        record["clips"][1]["arrays"]["features"]["path"] = escape

    tamper(store / "commits" / "00000.json", point)
    with pytest.raises(CorruptRecord, match="points at"):
        assert StoreReader(store).keys
    assert [p.shard for p in verify_store(store).problems] == ["00000"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(shard="../00001"), "names shard"),
        (lambda r: r.update(shard="00001"), "names shard"),
        (lambda r: r.update(settings_hash="0" * 64), "other settings"),
        (lambda r: r["clips"][0].update(index=1), "points at"),
        (lambda r: r["clips"][0].update(index=True), "index True"),
        (lambda r: r["clips"].reverse(), "order"),
        (lambda r: r["clips"][1].update(key="a0"), "twice"),
        (lambda r: r["clips"][1].update(key=""), "clip key"),
        (lambda r: r["clips"][1]["arrays"].pop("mask"), "arrays"),
        (lambda r: r["clips"][1]["arrays"]["mask"].update(bytes=-1), "size"),
        (lambda r: r["clips"][1]["arrays"]["mask"].update(crc32c="xyz"), "checksum"),
        (lambda r: r.pop("files"), "files"),
        (lambda r: r["files"].update({"../../store.json": r["files"]["zarr.json"]}), "lists"),
        (lambda r: r["files"].pop("zarr.json"), "lists"),
        (lambda r: r.update(clips=None), "NoneType"),
        (lambda r: r.update(source=3), "not text"),
    ],
)
def test_records_that_contradict_the_store_are_refused(
    store: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    tamper(store / "commits" / "00000.json", change)
    with pytest.raises(CorruptRecord, match=message):
        assert StoreReader(store).keys


def test_a_key_in_two_shards_is_refused_and_reported(store: Path) -> None:
    commit_twins(store, "x", "y")
    with pytest.raises(CorruptRecord, match=r"'twin' is in shards 'x' and 'y' of .*unique"):
        assert StoreReader(store).keys
    (problem,) = verify_store(store).problems
    assert (problem.shard, problem.key, problem.remedy) == ("y", "twin", "repair")


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, "4", None, True, 4.0])
@pytest.mark.parametrize("name", ["store.json", "commits/00000.json"])
def test_other_schema_versions_are_refused_with_a_way_out(
    store: Path, version: Any, name: str
) -> None:
    tamper(store / name, lambda record: record.update(schema_version=version))
    with pytest.raises(UnknownSchemaVersion) as error:
        assert StoreReader(store).keys
    message = str(error.value)
    assert f"schema version {version!r}, and this version of the package reads 4" in message
    is_older = version in (1, 2, 3) and type(version) is int
    assert error.value.remedy == ("make again" if is_older else None)
    assert ("update this package" in message) == (not is_older)
    if name == "store.json":
        with pytest.raises(UnknownSchemaVersion):
            StoreWriter.open(store.parent, SETTINGS, provenance={})
        with pytest.raises(CacheError):
            verify_store(store)
    else:
        (problem,) = verify_store(store).problems
        assert problem.shard == "00000"
        # Sealed like this, it is whole and not for this version; otherwise its number is damaged.
        assert problem.remedy == ("by hand" if type(version) is int else "repair")
