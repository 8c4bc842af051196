"""Dropped clips are removed and others unchanged, wherever a drop was killed before."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache_schema import (
    ClipMissing,
    ShardBusy,
    StoreReader,
    StoreWriter,
    verify_store,
)
from cache_schema.atomic_io import FileLock
from cache_schema.maintenance.drop import DropReport, drop_clips
from cache_schema.maintenance.repair import repair_store
from cache_schema.names import StoreLayout
from tests.cache_schema.faults.operations import run_and_kill
from tests.cache_schema.made_stores import SETTINGS, assert_whole, clip_of, files_of, write_shard

DROPPED = ["a1", "b0"]


def test_a_dropped_clip_is_skipped_and_the_others_stay(store: Path) -> None:
    before = StoreReader(store).record("a2")
    report = drop_clips(store, DROPPED, detail="the face of a bystander")
    assert report == DropReport(num_dropped=2, num_already_dropped=0, shards=("00000", "00001"))
    assert_whole(store, ["a0", "a2", "b1"])
    reader = StoreReader(store)
    assert {(c.key, c.reason, c.detail, c.shard) for c in reader.skipped} == {
        ("a3", "too_short", "12 frames, 49 needed", "00000"),
        ("a1", "dropped", "the face of a bystander", "00000"),
        ("b0", "dropped", "the face of a bystander", "00001"),
    }
    with pytest.raises(ClipMissing, match=r"skipped as dropped .the face of a bystander"):
        reader.read("a1")
    after = reader.record("a2")
    assert (after.attributes, after.source) == (before.attributes, before.source)
    assert after == before


def test_only_the_record_and_the_files_of_dropped_clips_change(store: Path) -> None:
    before = {path: path.stat().st_ino for path in (store / "shards").rglob("*")}
    drop_clips(store, ["a1"], detail="")
    after = {path: path.stat().st_ino for path in (store / "shards").rglob("*")}
    gone = {path.relative_to(store / "shards/00000").as_posix() for path in before.keys() - after}
    assert gone == {"features/c.1.0.0.0.0", "mask/c.1.0.0"}
    assert after.items() <= before.items()
    assert list((store / ".staging").iterdir()) == []
    assert verify_store(store).problems == ()


def test_zarr_sees_fill_values_where_a_clip_was_dropped(store: Path) -> None:
    drop_clips(store, ["a1"], detail="")
    features = zarr.open_array(str(store / "shards/00000"), path="features", mode="r")
    assert features.shape == (3, 3, 2, 3, 4)
    assert np.isnan(features[1]).all()
    index = StoreReader(store).record("a2").index
    np.testing.assert_array_equal(features[index], clip_of("a2")["features"])


def test_the_clips_that_stay_are_neither_listed_nor_opened(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of a drop must not grow with the clips that stay."""
    seen: list[str] = []

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *args: Any, **options: Any) -> Any:
            seen.append(str(path))
            return call(path, *args, **options)

        return noted

    monkeypatch.setattr(os, "open", noting(os.open))
    monkeypatch.setattr(os, "scandir", noting(os.scandir))
    drop_clips(store, ["a1"], detail="")
    assert seen
    folders = {str(store / "shards/00000" / name) for name in ("features", "mask")}
    assert {path for path in seen if "/shards/" in path} <= folders  # opened to be synced


def test_unknown_keys_are_refused_before_anything_changes(store: Path) -> None:
    before = files_of(store)
    with pytest.raises(ValueError, match="holds no clip 'nowhere'; nothing was dropped"):
        drop_clips(store, ["a0", "nowhere"], detail="")
    with pytest.raises(ValueError, match="'n4' and 3 more"):
        drop_clips(store, [f"n{i}" for i in range(8)], detail="")
    assert files_of(store) == before


def test_dropping_again_changes_nothing(store: Path) -> None:
    drop_clips(store, DROPPED, detail="first")
    before = files_of(store)
    assert drop_clips(store, DROPPED, detail="second") == DropReport(0, 2, ())
    assert files_of(store) == before
    assert drop_clips(store, [*DROPPED, "a0"], detail="third") == DropReport(1, 2, ("00000",))
    shards = StoreReader(store).shards.values()
    assert [(shard.generation, shard.group) for shard in shards] == [(2, 0), (1, 0)]


def test_a_shard_can_lose_all_its_clips(store: Path) -> None:
    drop_clips(store, ["b0", "b1"], detail="")
    assert_whole(store, ["a0", "a1", "a2"])
    drop_clips(store, ["a0"], detail="")
    assert_whole(store, ["a1", "a2"])


def test_a_dropped_clip_can_come_back_and_go_again(store: Path) -> None:
    drop_clips(store, ["a1"], detail="")
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    write_shard(writer, "00000-retry1", ["a1"])
    assert_whole(store, ["a0", "a1", "a2", "b0", "b1"])
    assert "a1" not in {clip.key for clip in StoreReader(store).skipped}
    assert drop_clips(store, ["a1"], detail="").shards == ("00000-retry1",)
    assert_whole(store, ["a0", "a2", "b0", "b1"])


def test_a_clip_that_was_made_again_counts_once(store: Path) -> None:
    drop_clips(store, ["a1"], detail="a new caption", reason="redo")
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    write_shard(writer, "00000-retry1", ["a1"])
    expected = DropReport(num_dropped=1, num_already_dropped=0, shards=("00000", "00000-retry1"))
    assert drop_clips(store, ["a1"], detail="a cut") == expected
    assert {clip.reason for clip in StoreReader(store).skipped if clip.key == "a1"} == {"dropped"}


def test_dropped_files_are_gone_after_a_power_failure(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [store / "shards/00000" / path for path in ("features/c.1.0.0.0.0", "mask/c.1.0.0")]
    synced: set[int] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        if not any(file.exists() for file in files):
            synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    drop_clips(store, ["a1"], detail="")
    assert {file.parent.stat().st_ino for file in files} <= synced


def test_what_was_to_be_made_again_can_be_dropped_for_good_and_the_other_way_round(
    store: Path,
) -> None:
    def reasons() -> list[tuple[str, str]]:
        skipped = StoreReader(store).skipped
        return [(clip.reason, clip.detail) for clip in skipped if clip.key == "a1"]

    drop_clips(store, ["a1"], detail="a new caption", reason="redo")
    assert reasons() == [("redo", "a new caption")]
    assert drop_clips(store, ["a1"], detail="a cut") == DropReport(1, 0, ("00000",))
    assert reasons() == [("dropped", "a cut")]
    assert drop_clips(store, ["a1"], detail="again") == DropReport(0, 1, ())
    drop_clips(store, ["a1"], detail="no cut", reason="redo")
    assert reasons() == [("redo", "no cut")]
    assert_whole(store, ["a0", "a2", "b0", "b1"])


def test_a_clip_that_a_repair_took_out_can_be_dropped_for_good(store: Path) -> None:
    (store / "shards/00000/features/c.1.0.0.0.0").write_bytes(b"")
    (damaged,) = repair_store(store).clips
    assert (damaged.key, damaged.reason) == ("a1", "damaged")
    assert drop_clips(store, ["a1"], detail="a cut") == DropReport(1, 0, ("00000",))
    (dropped,) = (clip for clip in StoreReader(store).skipped if clip.key == "a1")
    assert (dropped.reason, dropped.detail) == ("dropped", "a cut")
    assert dropped.fingerprint == damaged.fingerprint
    assert drop_clips(store, ["a1"], detail="again") == DropReport(0, 1, ())
    assert_whole(store, ["a0", "a2", "b0", "b1"])
    assert verify_store(store).problems == ()


def test_what_is_made_again_anyway_is_not_listed_anew(store: Path) -> None:
    before = files_of(store / "commits")
    assert drop_clips(store, ["a3"], detail="", reason="redo") == DropReport(0, 1, ())
    assert files_of(store / "commits") == before
    assert drop_clips(store, ["a3"], detail="a cut") == DropReport(1, 0, ("00000",))
    assert drop_clips(store, ["a3"], detail="no cut", reason="redo").num_dropped == 1
    assert [clip.reason for clip in StoreReader(store).skipped] == ["redo"]


def test_a_dropped_clip_leaves_no_second_listing_that_is_retried(store: Path) -> None:
    """The input had two clips of one name: one is held, the other was skipped as its duplicate."""
    with StoreWriter.open(store.parent, SETTINGS, provenance={}).shard("00002", source="c") as new:
        new.add("c0", clip_of("c0"), {}, fingerprint="c0" * 16)
        new.skip("c0", "duplicate_key", "named twice", fingerprint="c1" * 16)
        new.skip("a0", "duplicate_key", "shard '00000' holds it", fingerprint="c2" * 16)
        new.commit()
    report = drop_clips(store, ["a0", "c0"], detail="a cut")
    assert report == DropReport(2, 0, ("00000", "00002"))
    listed = [(clip.key, clip.reason) for clip in StoreReader(store)._index.all_skipped()]
    assert sorted(listed) == [
        ("a0", "dropped"),
        ("a0", "dropped"),
        ("a3", "too_short"),
        ("c0", "dropped"),
    ]


def test_a_shard_that_somebody_else_changes_is_left_alone(store: Path) -> None:
    layout = StoreLayout(store)
    layout.staging.mkdir(exist_ok=True)
    with (
        FileLock(layout.lock("00001"), wait=False, what="shard"),
        pytest.raises(ShardBusy, match=r"shard '00001' of .* by another process"),
    ):
        drop_clips(store, DROPPED, detail="")
    assert_whole(store, ["a0", "a2", "b0", "b1"])
    assert drop_clips(store, DROPPED, detail="") == DropReport(1, 1, ("00001",))
    assert_whole(store, ["a0", "a2", "b1"])


def test_a_clip_without_its_files_can_be_dropped(store: Path) -> None:
    (store / "shards/00000/features/c.1.0.0.0.0").unlink()
    drop_clips(store, ["a1"], detail="")
    assert_whole(store, ["a0", "a2", "b0", "b1"])


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, _finished_store: Path
) -> tuple[Path, int]:
    """A store after a drop that was left alone, and the number of its file operations."""
    store = tmp_path_factory.mktemp("dropped") / _finished_store.name
    shutil.copytree(_finished_store, store)
    code, operations = run_and_kill(functools.partial(drop_clips, store, DROPPED, detail="x"), 0)
    assert code == 0
    assert operations > 50
    return store, operations


def test_wherever_a_drop_is_killed_readers_see_whole_shards_and_a_rerun_finishes(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    _finished_store: Path,
    uninterrupted: tuple[Path, int],
) -> None:
    expected, operations = uninterrupted
    step = 1 if request.config.getoption("--full-faults") else operations // 20
    for kill_at in range(1, operations + 1, step):
        store = shutil.copytree(_finished_store, tmp_path / str(kill_at) / expected.name)
        drop = functools.partial(drop_clips, store, DROPPED, detail="x")
        code, _ = run_and_kill(drop, kill_at)
        assert code == -9
        keys = sorted(StoreReader(store).keys)
        assert keys in (
            ["a0", "a1", "a2", "b0", "b1"],
            ["a0", "a2", "b0", "b1"],
            ["a0", "a2", "b1"],
        )
        assert_whole(store, keys)
        report = drop()
        assert report.num_dropped + report.num_already_dropped == 2
        assert files_of(store) == files_of(expected)
        assert_whole(store, ["a0", "a2", "b1"])


def test_a_writer_sweeps_what_a_killed_drop_left(store: Path) -> None:
    file = store / "shards/00001/features/c.0.0.0.0.0"
    data = file.read_bytes()
    drop_clips(store, ["b0"], detail="")
    dropped = files_of(store)
    file.write_bytes(data)  # dropped, not removed
    (store / ".staging/00001.lock").touch()
    shutil.copytree(store / "shards/00000", store / "shards/00000~1")  # renamed, not committed
    StoreWriter.open(store.parent, SETTINGS, provenance={})
    assert files_of(store) == dropped
    assert_whole(store, ["a0", "a1", "a2", "b1"])


def test_a_writer_leaves_groups_alone_whose_record_cannot_be_read(store: Path) -> None:
    drop_clips(store, ["b0"], detail="")
    shutil.copytree(store / "shards/00001", store / "shards/00001~1")
    commit = store / "commits/00001.json"
    commit.write_bytes(commit.read_bytes()[:-9])
    before = files_of(store)
    StoreWriter.open(store.parent, SETTINGS, provenance={})
    assert files_of(store) == before


def test_a_replaced_shard_that_lost_its_record_is_written_anew(store: Path) -> None:
    drop_clips(store, ["b0"], detail="")
    (store / "commits/00001.json").unlink()
    assert repair_store(store).shards == ("00001",)
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    write_shard(writer, "00001", ["b0", "b1"])
    assert sorted(path.name for path in (store / "shards").iterdir()) == ["00000", "00001"]
    assert_whole(store, ["a0", "a1", "a2", "b0", "b1"])
