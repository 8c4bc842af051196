"""Symbolic links in a store: their targets are neither changed nor copied."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    StoreReader,
    StoreWriter,
    SymlinkInStore,
    verify_store,
)
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.made_stores import SETTINGS, files_of


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder that is nobody's business."""
    folder = tmp_path / "home"
    (folder / "features").mkdir(parents=True)
    (folder / "zarr.json").write_text("mine")
    (folder / "features" / "zarr.json").write_text("mine")
    (folder / "00000.json").write_text("mine")
    return folder


@pytest.mark.parametrize("command", ["extract", "repair", "drop", "merge", "copy"])
def test_no_command_changes_anything_behind_a_link(
    indexed: Path, home: Path, tmp_path: Path, command: str
) -> None:
    source = tmp_path / "source" / indexed.name
    copy_store(indexed, source)
    commands: dict[str, Callable[[], object]] = {
        "extract": lambda: StoreWriter.open(indexed.parent, SETTINGS, provenance={}),
        "repair": lambda: repair_store(indexed),
        "drop": lambda: drop_clips(indexed, ["a0"], detail=""),
        "merge": lambda: merge_stores(indexed, [source]),
        "copy": lambda: copy_store(source, indexed),
    }
    before = files_of(home)
    (indexed / "quarantine").mkdir()
    (indexed / ".staging" / "00000").mkdir(exist_ok=True)
    for link in ("shards", "commits", ".staging", "quarantine", "shards/00000", ".staging/00000"):
        place, away = indexed / link, tmp_path / "away"
        place.rename(away)
        place.symlink_to(home)
        with pytest.raises(SymlinkInStore, match="symbolic link"):
            commands[command]()
        assert files_of(home) == before
        place.unlink()
        away.rename(place)


def test_a_repair_takes_out_clips_behind_a_link_and_nothing_of_what_it_points_to(
    indexed: Path, home: Path
) -> None:
    features = indexed / "shards" / "00000" / "features"
    features.rename(home / "taken")
    features.symlink_to(home / "taken")
    before = files_of(home)
    problems = verify_store(indexed).problems
    assert {problem.key for problem in problems} == {None, "a0", "a1", "a2"}
    report = repair_store(indexed)
    assert [clip.key for clip in report.clips] == ["a0", "a1", "a2"]
    assert report.remaining == ()
    assert verify_store(indexed).problems == ()
    assert files_of(home) == before


def test_a_killed_writers_staging_is_not_taken_over_through_a_link(store: Path, home: Path) -> None:
    staged = store / ".staging" / "00002" / "5f0c1d9be27a4836" / "staged"
    (staged / "records").mkdir(parents=True)
    (staged / "shard").symlink_to(home)
    before = files_of(home)
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    with pytest.raises(SymlinkInStore), writer.shard("00002", source="00002.tar"):
        pass
    assert files_of(home) == before


@pytest.mark.parametrize("name", [".store.lock", ".index.npz", "00000.lock"])
def test_temporary_files_are_not_written_through_a_link(store: Path, home: Path, name: str) -> None:
    (store / ".staging").mkdir(exist_ok=True)
    (store / ".staging" / name).symlink_to(home / "zarr.json")
    before = files_of(home)
    with pytest.raises(SymlinkInStore):
        StoreWriter.open(store.parent, SETTINGS, provenance={}).write_index()
    with pytest.raises(SymlinkInStore):
        repair_store(store)
    assert files_of(home) == before


def test_a_merged_clip_is_a_file_and_no_link(indexed: Path, tmp_path: Path, home: Path) -> None:
    chunk = indexed / "shards" / "00000" / "mask" / "c.0.0.0"
    chunk.rename(home / "chunk")
    chunk.symlink_to(home / "chunk")
    target = tmp_path / "target" / indexed.name
    merge_stores(target, [indexed])
    merged = target / chunk.relative_to(indexed)
    assert merged.is_file()
    assert not merged.is_symlink()
    np.testing.assert_array_equal(
        StoreReader(target).read("a0")["mask"], StoreReader(indexed).read("a0")["mask"]
    )
