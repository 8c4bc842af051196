"""Writers racing for the same shards, some of them killed: each shard is written by exactly one."""

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from cache_schema import AlreadyCommitted, ShardBusy, StoreWriter, verify_store
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    SHARDS,
    assert_reads_what_is_committed,
    clip_of,
    finished_files,
    write_all,
    write_shard,
)
from tests.cache_schema.made_stores import files_of
from tests.fingerprints import fingerprint_of

fork = multiprocessing.get_context("fork")


def _race(root: Path, start: Barrier, outcomes: Connection) -> None:
    start.wait()
    writer = StoreWriter.open(root, SETTINGS, provenance={"version": "1.2.3"})
    try:
        with writer.shard("00001", source="00001.tar") as shard:
            for key in SHARDS["00001"]:
                shard.add(key, clip_of(key), {"source_fps": 29.97}, fingerprint=fingerprint_of(key))
            shard.commit()
        outcomes.send("written")
    except (ShardBusy, AlreadyCommitted) as error:
        outcomes.send(type(error).__name__)


def test_of_two_writers_racing_for_one_shard_one_writes_it(crowd: int, tmp_path: Path) -> None:
    alone = StoreWriter.open(tmp_path / "alone", SETTINGS, provenance={"version": "1.2.3"})
    write_shard(alone, "00001")
    for attempt in range(5):
        root = tmp_path / str(attempt)
        start = fork.Barrier(2)
        receive, send = fork.Pipe(duplex=False)
        processes = [fork.Process(target=_race, args=(root, start, send)) for _ in range(2)]
        for process in processes:
            process.start()
        outcomes = sorted(receive.recv() for _ in processes)
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert outcomes[1] == "written"
        assert outcomes[0] in ("AlreadyCommitted", "ShardBusy")
        store = root / alone.path.name
        assert files_of(store) == files_of(alone.path)
        assert verify_store(store).problems == ()


def _write_what_is_free(root: Path, seed: int) -> None:
    chance = random.Random(seed)
    while True:
        writer = StoreWriter.open(root, SETTINGS, provenance={"version": "1.2.3"})
        missing = [name for name in SHARDS if not writer.is_committed(name)]
        if not missing:
            return
        try:
            write_shard(writer, chance.choice(missing))
        except (ShardBusy, AlreadyCommitted):
            time.sleep(0.001)


def test_a_crowd_of_writers_of_which_some_are_killed_writes_one_store(
    crowd: int, tmp_path: Path
) -> None:
    expected = files_of(write_all(tmp_path / "alone"))
    chance = random.Random(crowd)
    root = tmp_path / "cache"
    store = root / SETTINGS.folder_name
    finished: dict[Path, tuple[int, int]] = {}
    for attempt in range(10):
        processes = [
            fork.Process(target=_write_what_is_free, args=(root, 3 * attempt + i)) for i in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes[: 3 if attempt < 9 else 1]:
            time.sleep(chance.uniform(0.0, 0.05))
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode in (0, -9)
        assert_reads_what_is_committed(store)
        assert finished.items() <= finished_files(store).items()
        finished = finished_files(store)
    write_all(root)
    assert files_of(store) == expected
    assert verify_store(store).problems == ()
