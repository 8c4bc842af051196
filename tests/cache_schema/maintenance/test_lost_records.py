"""Commit records that are missing, edited, or older than the index says."""

import os
import shutil
from pathlib import Path

import pytest

from cache_schema import (
    CorruptRecord,
    StoreReader,
    StoreSettings,
    StoreWriter,
    verify_store,
)
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.made_stores import SETTINGS, commit_twins, files_of, write_shard
from tests.cache_schema.servers import serving
from tests.cache_schema.tampering import tamper


def _all_found(store: Path) -> set[tuple[str | None, str]]:
    """Shard and mend of every problem, by sizes and by contents alike."""
    found: set[tuple[str | None, str]] = {(p.shard, p.remedy) for p in verify_store(store).problems}
    assert found == {(p.shard, p.remedy) for p in verify_store(store, fast=True).problems}
    return found


def test_a_lost_record_is_damage_to_every_command(indexed: Path, tmp_path: Path) -> None:
    whole = (indexed / "commits" / "00001.json").read_bytes()
    (indexed / "commits" / "00001.json").unlink()
    assert _all_found(indexed) == {("00001", "repair")}

    target = tmp_path / "target" / indexed.name
    writer = StoreWriter.open(indexed.parent, SETTINGS, provenance={})
    for use in (
        lambda: len(StoreReader(indexed)),
        lambda: copy_store(indexed, target),
        lambda: merge_stores(target, [indexed]),
        lambda: drop_clips(indexed, ["a0"], detail=""),
        writer.write_index,
    ):
        with pytest.raises(CorruptRecord, match=r"00001\.json cannot be found.* lists 2 clips"):
            use()
    assert not target.exists()

    report = repair_store(indexed)
    assert report.shards == ("00001",)
    assert report.remaining == ()
    assert report.quarantine is not None
    assert (report.quarantine / "shards" / "00001").is_dir()
    assert verify_store(indexed).problems == ()
    assert StoreReader(indexed).keys == ("a0", "a1", "a2")
    write_shard(StoreWriter.open(indexed.parent, SETTINGS, provenance={}), "00001", ["b0", "b1"])
    assert (indexed / "commits" / "00001.json").read_bytes() == whole


def test_records_lost_all_at_once_are_damage(indexed: Path) -> None:
    shutil.rmtree(indexed / "commits")
    with pytest.raises(CorruptRecord, match="cannot be found"):
        assert StoreReader(indexed).keys
    assert _all_found(indexed) == {("00000", "repair"), ("00001", "repair")}
    assert repair_store(indexed).shards == ("00000", "00001")
    assert verify_store(indexed).problems == ()


def test_a_folder_without_record_that_no_writer_left_is_damage(store: Path) -> None:
    (store / "commits" / "00001.json").unlink()  # and there is no index to tell of it
    assert _all_found(store) == {("00001", "repair")}
    assert repair_store(store).shards == ("00001",)
    assert verify_store(store).problems == ()


def test_a_record_lost_behind_an_address_is_damage_to_the_copy(indexed: Path) -> None:
    (indexed / "commits" / "00001.json").unlink()
    with serving(indexed.parent) as server:
        problems = verify_store(f"{server.url}/{indexed.name}").problems
    assert [(problem.shard, problem.remedy) for problem in problems] == [("00001", "copy")]


def test_an_older_state_of_a_shard_is_not_taken_for_the_current_one(
    indexed: Path, tmp_path: Path
) -> None:
    before = shutil.copytree(indexed, tmp_path / "before")
    drop_clips(indexed, ["a1"], detail="must not be shown")
    shutil.copyfile(before / "commits" / "00000.json", indexed / "commits" / "00000.json")
    shutil.rmtree(indexed / "shards" / "00000")
    shutil.copytree(before / "shards" / "00000", indexed / "shards" / "00000")
    with pytest.raises(CorruptRecord, match="an older version was restored"):
        assert StoreReader(indexed).keys
    assert _all_found(indexed) == {("00000", "repair")}
    report = repair_store(indexed)
    assert report.shards == ("00000",)
    # Nobody else remembers that it was dropped.
    assert [(one.key, one.remedy) for one in report.remaining] == [("a1", "by hand")]
    assert verify_store(indexed).problems == ()
    assert StoreReader(indexed).keys == ("b0", "b1")


def test_a_record_that_was_edited_with_its_checksum_is_not_believed(indexed: Path) -> None:
    tamper(
        indexed / "commits" / "00000.json",
        lambda record: record["clips"][0]["attributes"].update(name="other"),
    )
    with pytest.raises(CorruptRecord, match="it was changed"):
        assert StoreReader(indexed).keys
    assert _all_found(indexed) == {("00000", "repair")}
    report = repair_store(indexed)
    assert (report.shards, report.remaining) == (("00000",), ())
    assert verify_store(indexed).problems == ()
    assert StoreReader(indexed).keys == ("b0", "b1")


def test_a_key_in_a_shard_and_its_retry_is_mended_at_once(indexed: Path) -> None:
    commit_twins(indexed, "x-retry1", "x")
    report = repair_store(indexed)
    assert [(clip.key, clip.shard) for clip in report.clips] == [("twin", "x-retry1")]
    assert report.remaining == ()
    assert verify_store(indexed).problems == ()
    assert StoreReader(indexed).shard_of("twin") == "x"


@pytest.mark.parametrize("folder", ["shards", "commits", "shards/00000/mask", "quarantine"])
def test_names_that_are_no_text_are_taken_out(indexed: Path, folder: str) -> None:
    (indexed / folder).mkdir(exist_ok=True)
    odd = os.fsencode(indexed / folder) + b"/caf\xe9"
    try:
        Path(os.fsdecode(odd)).write_text("?")
    except OSError:
        pytest.skip("this file system holds names in UTF-8 only")
    report = repair_store(indexed)
    assert report.remaining == ()
    assert verify_store(indexed).problems == ()
    for problem in report.found:
        assert problem.what.encode("utf-8")
        assert "caf\\xe9" in problem.what
    assert bool(report.found) == (folder != "quarantine")


def test_a_store_file_of_another_store_is_told_from_damaged_records(indexed: Path) -> None:
    whole = (indexed / "store.json").read_bytes()
    other = StoreSettings(kind=SETTINGS.kind, arrays=SETTINGS.arrays, values={"fps": 9.0})
    writer = StoreWriter.open(indexed.parent / "other", other, provenance={})
    shutil.copyfile(writer.path / "store.json", indexed / "store.json")
    before = files_of(indexed / "shards")
    (problem,) = verify_store(indexed).problems
    assert (problem.shard, problem.remedy) == (None, "repair")
    assert "store with other settings" in problem.what
    (remaining,) = repair_store(indexed).remaining
    assert remaining.remedy == "rewrite"
    assert files_of(indexed / "shards") == before
    StoreWriter.open(indexed.parent, SETTINGS, provenance={"version": "1.2.3"})
    assert (indexed / "store.json").read_bytes() == whole
    assert verify_store(indexed).problems == ()
