"""Repairing stores: damaged files are quarantined, intact clips are kept."""

import json
from pathlib import Path

import pytest

from cache_schema import (
    Refused,
    StoreReader,
    StoreWriter,
    UnknownSchemaVersion,
    checksummed_json,
    verify_store,
)
from cache_schema.atomic_io import FileLock
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.made_stores import (
    SETTINGS,
    assert_whole,
    commit_twins,
    files_of,
    write_shard,
)

CHUNK = "shards/00000/features/c.1.0.0.0.0"


def _flip(path: Path, position: int = 20) -> bytes:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    return bytes(data)


def _assert_holds(store: Path, keys: list[str]) -> None:
    assert verify_store(store).problems == ()
    assert_whole(store, keys)
    reader = StoreReader(store)
    for key in keys:
        assert reader.record(key).attributes == {"source_fps": 29.97, "name": key}


def test_a_whole_store_is_left_alone(indexed: Path) -> None:
    before = files_of(indexed)
    report = repair_store(indexed)
    assert (report.found, report.remaining, report.clips, report.shards) == ((), (), (), ())
    assert report.quarantine is None
    assert files_of(indexed) == before


def test_a_damaged_clip_goes_and_the_others_stay(indexed: Path) -> None:
    damaged = _flip(indexed / CHUNK)
    inode = (indexed / "shards/00000/features/c.2.0.0.0.0").stat().st_ino
    untouched = (indexed / "commits" / "00001.json").stat()
    report = repair_store(indexed)
    assert [(clip.key, clip.reason, clip.shard) for clip in report.clips] == [
        ("a1", "damaged", "00000")
    ]
    assert report.quarantine == indexed / "quarantine" / "1"
    assert (report.quarantine / CHUNK).read_bytes() == damaged
    assert [found["key"] for found in json.loads((report.quarantine / "found.json").read_text())]
    # Taken as they are, not copied.
    assert (indexed / "shards/00000~1/features/c.1.0.0.0.0").stat().st_ino == inode
    assert (indexed / "commits" / "00001.json").stat() == untouched
    _assert_holds(indexed, ["a0", "a2", "b0", "b1"])
    skipped = {clip.key: clip.reason for clip in StoreReader(indexed).skipped}
    assert skipped == {"a1": "damaged", "a3": "too_short"}
    assert repair_store(indexed).found == ()


def test_a_shard_whose_record_is_damaged_goes_whole_and_is_made_again(indexed: Path) -> None:
    whole = (indexed / "commits" / "00000.json").read_bytes()
    _flip(indexed / "commits" / "00000.json", 100)
    report = repair_store(indexed)
    assert report.shards == ("00000",)
    assert report.quarantine is not None
    assert (report.quarantine / "commits" / "00000.json").is_file()
    assert (report.quarantine / CHUNK).is_file()
    _assert_holds(indexed, ["b0", "b1"])
    write_shard(
        StoreWriter.open(indexed.parent, SETTINGS, provenance={}),
        "00000",
        ["a0", "a1", "a2"],
        skip="a3",
    )
    assert (indexed / "commits" / "00000.json").read_bytes() == whole


def test_lost_metadata_is_made_again_and_no_clip_goes(indexed: Path) -> None:
    (indexed / "shards/00001/zarr.json").unlink()
    _flip(indexed / "shards/00001/features/zarr.json")
    report = repair_store(indexed)
    assert report.clips == ()
    _assert_holds(indexed, ["a0", "a1", "a2", "b0", "b1"])


def test_of_a_lost_group_every_clip_is_listed(indexed: Path) -> None:
    (indexed / "shards" / "00001").rename(indexed.parent / "gone")
    report = repair_store(indexed)
    assert [clip.key for clip in report.clips] == ["b0", "b1"]
    _assert_holds(indexed, ["a0", "a1", "a2"])
    assert {clip.key for clip in StoreReader(indexed).skipped} == {"a3", "b0", "b1"}


def test_foreign_entries_and_leftovers_go_without_a_new_generation(indexed: Path) -> None:
    before = files_of(indexed)
    for path in ("shards/00000/mask/notes", "shards/00000~3/zarr.json", "shards/00007~1/x"):
        (indexed / path).parent.mkdir(parents=True, exist_ok=True)
        (indexed / path).write_text("?")
    (indexed / "shards" / "a b").mkdir()
    (indexed / "commits" / ".00000.json.swp").write_text("?")
    report = repair_store(indexed)
    assert report.quarantine is not None
    assert sorted(files_of(report.quarantine)) == [
        "commits/.00000.json.swp",
        "found.json",
        "shards/00000/mask/notes",
        "shards/00000~3/zarr.json",
        "shards/00007~1/x",
    ]
    assert {p: d for p, d in files_of(indexed).items() if "quarantine" not in p} == before
    assert repair_store(indexed).found == ()


def test_every_repair_has_a_quarantine_of_its_own(indexed: Path) -> None:
    for number, key in ((1, "00000/features/c.1"), (2, "00000~1/features/c.1")):
        _flip(indexed / "shards" / f"{key}.0.0.0.0")
        assert repair_store(indexed).quarantine == indexed / "quarantine" / str(number)
    assert list(StoreReader(indexed).keys) == ["a0", "b0", "b1"]


@pytest.mark.parametrize("damage", ["flip", "cut", "behind"])
def test_the_index_is_written_anew(indexed: Path, damage: str) -> None:
    index = indexed / "index.npz"
    if damage == "flip":
        _flip(index, 500)
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:1000])
    else:
        writer = StoreWriter.open(indexed.parent, SETTINGS, provenance={})
        write_shard(writer, "00002", ["c0"])
    assert len(repair_store(indexed).found) == 1
    found = index.read_bytes()
    index.unlink()
    StoreWriter.open(indexed.parent, SETTINGS, provenance={}).write_index()
    assert index.read_bytes() == found


@pytest.fixture
def twins(indexed: Path) -> Path:
    """A store in which two shards hold one key."""
    commit_twins(indexed, "x", "y")
    return indexed


def test_of_a_key_in_two_shards_the_first_ones_stays(twins: Path) -> None:
    report = repair_store(twins)
    assert [(clip.key, clip.reason, clip.shard) for clip in report.clips] == [
        ("twin", "duplicate_key", "y")
    ]
    _assert_holds(twins, ["a0", "a1", "a2", "b0", "b1", "twin"])
    assert StoreReader(twins).shard_of("twin") == "x"


def test_of_a_key_in_two_shards_the_intact_one_stays(twins: Path) -> None:
    _flip(twins / "shards/x/mask/c.0.0.0", 1)
    report = repair_store(twins)
    assert [(clip.key, clip.reason, clip.shard) for clip in report.clips] == [
        ("twin", "damaged", "x")
    ]
    _assert_holds(twins, ["a0", "a1", "a2", "b0", "b1", "twin"])
    assert StoreReader(twins).shard_of("twin") == "y"


def test_a_damaged_store_file_goes_and_extraction_writes_it_again(indexed: Path) -> None:
    _flip(indexed / "store.json", 60)
    report = repair_store(indexed)
    assert len(report.found) == 1
    (remaining,) = report.remaining
    assert remaining.remedy == "rewrite"
    assert not (indexed / "store.json").exists()
    StoreWriter.open(indexed.parent, SETTINGS, provenance={})
    assert repair_store(indexed).found == ()
    _assert_holds(indexed, ["a0", "a1", "a2", "b0", "b1"])


def test_a_store_of_another_version_is_not_touched(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksummed_json, "SCHEMA_VERSION", 2)
    record = json.loads((store / "store.json").read_bytes())
    del record["crc32c"], record["schema_version"]
    (store / "store.json").write_bytes(checksummed_json.encode_record(record))
    monkeypatch.undo()
    before = files_of(store)
    with pytest.raises(UnknownSchemaVersion, match="schema version 2") as error:
        repair_store(store)
    assert error.value.remedy == "make again"
    assert files_of(store) == before


def test_shards_packed_otherwise_than_the_store_says_are_left_alone(packed_otherwise: Path) -> None:
    before = files_of(packed_otherwise / "shards")
    remaining = repair_store(packed_otherwise).remaining
    assert [problem.remedy for problem in remaining] == ["by hand"]
    assert files_of(packed_otherwise / "shards") == before


def test_a_shard_in_another_writers_hands_is_left_to_it(indexed: Path) -> None:
    _flip(indexed / CHUNK)
    with FileLock(indexed / ".staging" / "00000.lock", wait=False, what="shard '00000'"):
        report = repair_store(indexed)
    assert [(problem.shard, problem.key) for problem in report.remaining] == [("00000", "a1")]
    assert report.clips == ()
    assert [clip.key for clip in repair_store(indexed).clips] == ["a1"]
    _assert_holds(indexed, ["a0", "a2", "b0", "b1"])


def test_an_address_is_not_repaired() -> None:
    with pytest.raises(Refused) as error:
        repair_store("http://localhost/store")  # type: ignore[arg-type]
    assert error.value.remedy == "copy"
