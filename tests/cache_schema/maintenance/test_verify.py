"""Verifying stores: which states are reported, with which remedy, and which are harmless."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import (
    StoreNotFound,
    StoreWriter,
    verify_store,
)
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.made_stores import SETTINGS, files_of, write_shard
from tests.cache_schema.servers import serving_plainly


def _mends(store: Path | str, **options: Any) -> list[tuple[str | None, str | None, str]]:
    problems = verify_store(store, **options).problems
    return [(problem.shard, problem.key, problem.remedy) for problem in problems]


@pytest.mark.parametrize("fast", [False, True])
def test_a_whole_store_has_no_problems_and_is_not_touched(indexed: Path, fast: bool) -> None:
    before = files_of(indexed)
    done: list[int] = []
    report = verify_store(indexed, fast=fast, advance=done.append)
    assert report.problems == ()
    assert report.num_clips == 5
    sizes = {path: len(data) for path, data in before.items() if path.startswith("shards/")}
    assert report.num_bytes == sum(size for path, size in sizes.items() if "/c." in path)
    assert sum(done) == sum(sizes.values())
    assert files_of(indexed) == before


def test_a_store_without_an_index_is_whole_too(store: Path) -> None:
    assert not (store / "index.npz").exists()
    assert verify_store(store).problems == ()


def test_a_folder_without_a_store_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        verify_store(tmp_path)


def test_an_index_that_is_behind_the_records_is_harmless(indexed: Path) -> None:
    writer = StoreWriter.open(indexed.parent, SETTINGS, provenance={})
    write_shard(writer, "00002", ["c0"])
    (problem,) = verify_store(indexed).problems
    assert "'00002'" in problem.what
    assert problem.remedy == "extract"
    writer.write_index()
    assert verify_store(indexed).problems == ()


def test_an_index_that_reads_and_says_otherwise_than_the_records_is_found(indexed: Path) -> None:
    other = indexed.parent / "other"
    writer = StoreWriter.open(other, SETTINGS, provenance={})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a4")
    write_shard(writer, "00001", ["b0", "b1"])
    writer.write_index()
    columns = dict(np.load(writer.path / "index.npz"))
    for name in ("shards.crc32c", "store.crc32c"):
        columns[name] = np.load(indexed / "index.npz")[name]
    with (indexed / "index.npz").open("wb") as file:
        np.savez(file, **columns)
    (problem,) = verify_store(indexed).problems
    assert (problem.shard, problem.key, problem.remedy) == (None, None, "repair")
    assert "does not agree with the commit records" in problem.what


def test_what_a_killed_writer_leaves_is_harmless(indexed: Path) -> None:
    (indexed / "shards" / "00002" / "features").mkdir(parents=True)
    for shard in ("00002", "00003"):
        (indexed / ".staging" / shard).mkdir(parents=True)
    assert _mends(indexed) == [("00002", None, "extract")]


def test_groups_of_other_generations_and_foreign_entries_are_found(indexed: Path) -> None:
    (indexed / "shards" / "00000~2").mkdir()
    (indexed / "shards" / "00005~1").mkdir()
    (indexed / "shards" / "00001" / "features" / "notes").mkdir()
    (indexed / "shards" / "what is this").write_text("?")
    (indexed / "commits" / "00001.json~").write_text("?")
    for fast in (False, True):
        assert sorted(_mends(indexed, fast=fast), key=str) == [
            ("00000", None, "repair"),
            ("00001", None, "repair"),
            ("00005", None, "repair"),
            (None, None, "repair"),
            (None, None, "repair"),
        ]


def test_a_shard_that_lost_a_clip_is_whole(indexed: Path) -> None:
    drop_clips(indexed, ["a1"], detail="a test")
    assert verify_store(indexed).problems == ()
    (indexed / "shards" / "00000" / "mask" / "c.2.0.0").unlink()
    assert _mends(indexed) == [("00000", "a2", "repair")]


def _damage(store: Path) -> set[tuple[str | None, str | None]]:
    """What is wrong with a store apart from what is harmless."""
    problems = verify_store(store, fast=True).problems
    return {(problem.shard, problem.key) for problem in problems if problem.remedy != "extract"}


CHANGES: dict[str, Callable[[Path], object]] = {
    "drop": lambda store: drop_clips(store, ["a2"], detail="while verify looks"),
    "repair": repair_store,
}
LOST: set[tuple[str | None, str | None]] = {("00000", "a1")}


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_is_only_called_damaged_for_what_is_damaged_at_every_step_of_a_change(
    change: str, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify looks before and after everything that a drop or a repair moves or removes."""
    (indexed / "shards/00000/mask/c.1.0.0").unlink()
    looks: list[set[tuple[str | None, str | None]]] = []

    def watch(name: str) -> None:
        original = getattr(Path, name)

        def call(*args: Any, **options: Any) -> Any:
            looks.append(_damage(indexed))
            result = original(*args, **options)
            looks.append(_damage(indexed))
            return result

        monkeypatch.setattr(Path, name, call)

    watch("rename")
    watch("unlink")
    CHANGES[change](indexed)
    monkeypatch.undo()
    assert len(looks) > 10
    assert LOST in looks
    assert all(look <= LOST for look in looks)


class _At:
    """Calls `change` at the n-th file or folder of a store that is opened."""

    def __init__(self, number: int, store: Path, change: Callable[[Path], object]) -> None:
        self.left, self.store, self.change = number, store, change

    def watch(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(os, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if str(self.store) in str(path):
                self.left -= 1
                if self.left == 0:
                    self.change(self.store)
            return original(path, *args, **options)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_that_is_changed_between_two_looks_is_only_called_damaged_for_what_is(
    change: str,
    indexed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The drop or the repair happens, all of it, at each thing that verify looks at in turn."""
    (indexed / "shards/00000/mask/c.1.0.0").unlink()
    for number in range(1, 1000, 1 if request.config.getoption("--full-faults") else 3):
        store = shutil.copytree(indexed, tmp_path / str(number) / indexed.name)
        at = _At(number, store, CHANGES[change])
        with monkeypatch.context() as patch:
            at.watch("open", patch)
            at.watch("scandir", patch)
            assert _damage(store) <= LOST, number
        if at.left > 0:
            break
    assert number > 10


def test_a_shard_whose_folder_goes_while_it_is_listed_is_not_passed_over(
    indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (indexed / "shards/00000/mask/c.1.0.0").unlink()
    scan = os.scandir

    def gone_once(path: Any) -> Any:
        monkeypatch.setattr(os, "scandir", scan)
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "scandir", gone_once)
    assert _damage(indexed) == LOST


def test_shards_packed_otherwise_than_the_store_says_are_not_taken_for_damaged(
    packed_otherwise: Path,
) -> None:
    (problem,) = verify_store(packed_otherwise).problems
    assert (problem.shard, problem.key, problem.remedy) == ("00000", None, "by hand")
    assert "store.json says" in problem.what


@pytest.fixture
def address(store: Path) -> Iterator[str]:
    """Of a web server that serves the cache's folder."""
    with serving_plainly(store.parent) as url:
        yield url


@pytest.mark.parametrize("where", ["http", "file"])
@pytest.mark.parametrize("fast", [False, True])
def test_stores_behind_addresses_are_verified_by_their_index(
    indexed: Path, address: str, where: str, fast: bool
) -> None:
    root = address if where == "http" else f"file://{indexed.parent}"
    url = f"{root}/{indexed.name}"
    report = verify_store(url, fast=fast)
    assert report == verify_store(indexed)
    assert report.problems == ()

    chunk = indexed / "shards" / "00000" / "features" / "c.1.0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (indexed / "shards" / "00001" / "mask" / "zarr.json").unlink()
    expected = [("00000", "a1", "copy"), ("00001", None, "copy")]
    assert _mends(url, fast=fast) == expected

    (indexed / "commits" / "00001.json").unlink()
    shards = {shard for shard, _, remedy in _mends(url, fast=fast) if remedy == "copy"}
    assert shards == {"00000", "00001"}

    (indexed / "index.npz").unlink()
    problems = verify_store(url, fast=fast).problems
    assert "index.npz cannot be found" in problems[0].what
    assert problems[0].remedy == "copy"
