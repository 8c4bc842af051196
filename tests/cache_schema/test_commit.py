"""Duplicate keys that a writer rejects, the records it reads for that, and updates of the index."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import (
    CorruptRecord,
    StoreReader,
    StoreWriter,
    commit,
    verify_store,
)
from cache_schema import (
    index as clip_index,
)
from cache_schema.atomic_io import FileLock
from cache_schema.index_columns import num_listed_shards, write_columns
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from cache_schema.names import StoreLayout
from tests.cache_schema.made_stores import SETTINGS, clip_of, write_shard
from tests.fingerprints import fingerprint_of


def _writers(store: Path, number: int) -> list[StoreWriter]:
    return [StoreWriter.open(store.parent, SETTINGS, provenance={}) for _ in range(number)]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_writer_refuses_the_keys_that_it_knows(store: Path, indexed: bool) -> None:
    first, second = _writers(store, 2)
    if indexed:
        first.write_index()
    write_shard(first, "2", ["own"])
    write_shard(second, "3", ["others"])
    write_shard(second, "3-retry1", ["retried once"])
    write_shard(second, "3-retry2", ["retried twice"])
    write_shard(second, "4-retry1", ["retried of another"])
    with first.shard("3-retry3", source="3") as shard:
        for key, holder in (
            ("a1", "00000"),
            ("own", "2"),
            ("others", "3"),
            ("retried once", "3-retry1"),
            ("retried twice", "3-retry2"),
        ):
            assert shard.shard_holding(key) == holder
            with pytest.raises(ValueError, match=f"already in shard '{holder}'"):
                shard.add(key, clip_of(key), fingerprint=fingerprint_of(key))
        assert shard.shard_holding("new") is None
    with first.shard("4", source="4") as shard:  # whose retry came first
        assert shard.shard_holding("retried of another") == "4-retry1"


def test_records_that_others_commit_meanwhile_are_not_parsed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _writers(store, 2)
    write_shard(first, "2", ["c"])
    for number in range(3, 8):
        write_shard(second, str(number), [f"{number}"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a record was parsed")

    monkeypatch.setattr(commit, "read_commit", refuse)
    monkeypatch.setattr(clip_index, "parse_commit", refuse)
    with first.shard("9", source="9") as shard:
        assert shard.shard_holding("c") == "2"


@pytest.mark.parametrize("indexed", [True, False])
def test_a_key_in_two_shards_is_refused_by_whoever_has_both_records(
    store: Path, tmp_path: Path, indexed: bool
) -> None:
    first, second, third = _writers(store, 3)
    write_shard(first, "x", ["x0"])
    write_shard(second, "y", ["twin", "y0"])
    if indexed:
        third.write_index()
    index = (store / "index.npz").read_bytes() if indexed else None
    write_shard(first, "z", ["twin", "z0"])  # it took its first shard before there was "y"
    reader = StoreReader(store)
    for use in (
        lambda: reader.read("twin"),
        lambda: reader.read("a0"),
        first.write_index,
        third.write_index,
        lambda: drop_clips(store, ["a0"], detail=""),
        lambda: copy_store(store, tmp_path / "copy"),
        lambda: merge_stores(tmp_path / "merged" / store.name, [store]),
    ):
        with pytest.raises((CorruptRecord, ValueError), match=r"'twin'.*(y.*z|z.*y)"):
            use()
    assert (store / "index.npz").exists() == indexed
    assert index is None or (store / "index.npz").read_bytes() == index
    twins = [problem for problem in verify_store(store).problems if problem.key is not None]
    assert [(problem.shard, problem.key) for problem in twins] == [("z", "twin")]
    assert "'y'" in twins[0].what
    assert [(clip.shard, clip.key) for clip in repair_store(store).clips] == [("z", "twin")]
    assert verify_store(store).problems == ()
    np.testing.assert_array_equal(StoreReader(store).read("twin")["mask"], clip_of("twin")["mask"])


def test_committing_writers_keep_the_index_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_MAX_UNLISTED", 2)
    monkeypatch.setattr(commit, "_MAX_UNLISTED_SHARE", 0.5)
    writers = [StoreWriter.open(tmp_path, SETTINGS, provenance={}) for _ in range(3)]
    index = writers[0].path / "index.npz"
    listed, expected, found = 0, [], []
    for finished in range(1, 31):
        write_shard(writers[finished % 3], f"{finished:05d}", [f"k{finished}"])
        if finished > listed + 2 and finished > 1.5 * listed:
            listed = finished
        expected.append(listed)
        found.append(num_listed_shards(index))
    assert found == expected
    assert set(found) == {0, 3, 6, 10, 16, 25}
    with writers[25 % 3].shard("last", source="last") as shard:  # who wrote it knows what it lists
        assert shard.shard_holding("k24") == "00024"
    assert verify_store(writers[0].path, fast=True).problems[0].remedy == "extract"
    writers[0].write_index()
    assert verify_store(writers[0].path).problems == ()


def test_an_index_that_another_process_is_at_is_not_waited_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_MAX_UNLISTED", 1)
    (writer,) = _writers(store, 1)
    with FileLock(StoreLayout(store).store_lock, wait=True, what="the store"):
        write_shard(writer, "2", ["c"])
        assert not (store / "index.npz").exists()
    write_shard(writer, "3", ["d"])
    assert num_listed_shards(store / "index.npz") == 4


def test_of_processes_that_want_the_index_at_once_one_writes_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = write_columns

    def noting(*given: Any) -> None:
        written.append(1)
        original(*given)

    monkeypatch.setattr(clip_index, "write_columns", noting)
    layout = StoreLayout(store)
    writers = _writers(store, 4)
    with ThreadPoolExecutor() as threads:
        with FileLock(layout.store_lock, wait=True, what="the store") as lock:
            ends = [threads.submit(writer.write_index) for writer in writers]
            time.sleep(0.2)  # until they wait for the lock, as a rule
            clip_index.write_index(layout, SETTINGS, lock)
        for end in ends:
            end.result(timeout=60)
        assert len(written) == 1
        write_shard(writers[0], "2", ["c"])  # and the lock is had by nobody
        ends = [threads.submit(writer.write_index) for writer in writers]
        for end in ends:
            end.result(timeout=60)
    assert len(written) == 2
    with FileLock(layout.store_lock, wait=True, what="the store"):
        writers[0].write_index()  # which is there: nobody is waited for
    assert verify_store(store).problems == ()


def test_a_damaged_index_is_written_anew_by_who_commits(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_MAX_UNLISTED", 0)
    writer, other = _writers(store, 2)
    writer.write_index()
    data = (store / "index.npz").read_bytes()
    assert num_listed_shards(store / "index.npz") == 2
    for broken in (
        b"",
        data[:-1],
        data[: len(data) // 2],
        data.replace(b"shards.crc32c", b"?" * 13),
    ):
        (store / "index.npz").write_bytes(broken)
        assert num_listed_shards(store / "index.npz") == 0
    write_shard(other, "2", ["c"])
    assert num_listed_shards(store / "index.npz") == 3
    assert verify_store(store).problems == ()


def test_a_shard_is_committed_even_if_the_index_cannot_be_written(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, other = _writers(store, 2)
    write_shard(writer, "x", ["x0"])
    write_shard(other, "y", ["twin"])
    monkeypatch.setattr(commit, "_MAX_UNLISTED", 1)
    with pytest.raises(CorruptRecord, match="'twin' is in shards 'y' and 'z'"):
        write_shard(writer, "z", ["twin"])
    assert writer.is_committed("z")
    assert not writer.is_busy("z")
    assert repair_store(store).remaining == ()
    assert StoreReader(store).keys == ("a0", "a1", "a2", "b0", "b1", "twin", "x0")
