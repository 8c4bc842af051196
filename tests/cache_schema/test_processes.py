"""Several processes using one store: exclusive writers, readers passed to other processes."""

import multiprocessing
import pickle
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import ShardBusy, StoreReader, StoreWriter, verify_store
from tests.cache_schema.made_stores import SETTINGS, clip_of, write_shard
from tests.fingerprints import fingerprint_of


def test_a_shard_has_one_writer_even_in_one_process(tmp_path: Path) -> None:
    first = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    second = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with first.shard("0", source="0") as shard:
        with (
            pytest.raises(ShardBusy, match=r"shard '0' .* another process"),
            second.shard("0", source="0"),
        ):
            pass
        with second.shard("1", source="1") as other:
            other.add("b", clip_of("b"), fingerprint=fingerprint_of("b"))
            other.commit()
        shard.add("a", clip_of("a"), fingerprint=fingerprint_of("a"))
        shard.commit()
    assert StoreReader(first.path).keys == ("a", "b")


def test_of_writers_racing_for_shards_each_shard_is_written_by_one(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    shards = [f"{i:05d}" for i in range(4)]

    def race(start: int, outcomes: Connection) -> None:
        writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
        for i in range(len(shards)):
            name = shards[(start + i) % len(shards)]
            while not writer.is_committed(name):
                try:
                    with writer.shard(name, source=name) as shard:
                        for j in range(2):
                            shard.add(
                                f"{name}/{j}",
                                clip_of(f"{name}/{j}"),
                                fingerprint=fingerprint_of(f"{name}/{j}"),
                            )
                        shard.commit()
                    outcomes.send(("written", name))
                except ShardBusy:
                    outcomes.send(("busy", name))
                    time.sleep(0.01)
        outcomes.send(("done", str(start)))

    receive, send = fork.Pipe(duplex=False)
    processes = [fork.Process(target=race, args=(start % 2, send)) for start in range(3)]
    for process in processes:
        process.start()
    outcomes: list[tuple[str, str]] = []
    while sum(what == "done" for what, _ in outcomes) < len(processes):
        outcomes.append(receive.recv())
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(name for what, name in outcomes if what == "written") == shards
    (path,) = tmp_path.iterdir()
    reader = StoreReader(path)
    assert len(reader) == 8
    for key in reader.keys:
        np.testing.assert_array_equal(reader.read(key)["mask"], clip_of(key)["mask"])
    report = verify_store(path)
    assert report.problems == ()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    receive, send = fork.Pipe(duplex=False)

    def hold() -> None:
        with writer.shard("0", source="0") as shard:
            shard.add("a", clip_of("a"), fingerprint=fingerprint_of("a"))
            send.send("staged")
            time.sleep(60)

    process = fork.Process(target=hold)
    process.start()
    assert receive.recv() == "staged"
    with pytest.raises(ShardBusy), writer.shard("0", source="0"):
        pass
    process.kill()
    process.join()
    with writer.shard("0", source="0") as shard:
        assert shard.has("a")


def _read_all(reader: StoreReader, results: Connection) -> None:
    values = {key: reader.read(key)["features"].tobytes() for key in reader.keys}
    results.send((values, reader.record("a2").key))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_a_reader_works_in_other_processes(
    store: Path, method: str, used_before: bool, with_index: bool
) -> None:
    if with_index:
        StoreWriter.open(store.parent, SETTINGS, provenance={}).write_index()
    context: Any = multiprocessing.get_context(method)
    reader = StoreReader(store)
    if used_before:
        reader.read("a0")
        reader.record("a0")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_read_all, args=(reader, send))
    process.start()
    found = receive.recv()
    process.join()
    assert process.exitcode == 0
    assert found == ({key: clip_of(key)["features"].tobytes() for key in reader.keys}, "a2")


@pytest.mark.parametrize("used_before", [False, True])
def test_a_pickled_reader_sees_the_same_clips(store: Path, used_before: bool) -> None:
    reader = StoreReader(store)
    if used_before:
        reader.read("a0")
    pickled = pickle.dumps(reader)
    write_shard(StoreWriter.open(store.parent, SETTINGS, provenance={}), "00002", ["c0"])
    copy = pickle.loads(pickled)
    assert copy.keys == reader.keys == ("a0", "a1", "a2", "b0", "b1")
    np.testing.assert_array_equal(copy.read("b0")["mask"], clip_of("b0")["mask"])
