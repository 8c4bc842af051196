"""Writers killed at any point: readers see no wrong data, and no finished work is repeated."""

import functools
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    ArraySpec,
    StoreNotFound,
    StoreReader,
    StoreSettings,
    StoreWriter,
    verify_store,
)
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.faults.operations import run_and_kill
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    assert_equals_the_clip,
    assert_reads_what_is_committed,
    damage_in_every_way,
    finished_files,
    without_quarantine,
    write_again,
    write_all,
)
from tests.cache_schema.made_stores import files_of
from tests.fingerprints import fingerprint_of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The store of a run that was left alone, and the number of its file operations."""
    root = tmp_path_factory.mktemp("uninterrupted")
    code, operations = run_and_kill(lambda: write_all(root), 0)
    assert code == 0
    assert operations > 100
    return root / SETTINGS.folder_name, operations


def test_a_killed_run_finishes_bit_for_bit_as_an_uninterrupted_one(
    kill: int, tmp_path: Path, uninterrupted: tuple[Path, int]
) -> None:
    expected, operations = uninterrupted
    chance = random.Random(kill)
    kill_at = [chance.randint(1, operations)]
    while chance.random() < 0.3:  # and killed again while it recovers
        kill_at.append(chance.randint(1, operations))
    store = tmp_path / expected.name
    finished: dict[Path, tuple[int, int]] = {}
    for n in kill_at:
        run_and_kill(functools.partial(write_all, tmp_path), n)
        assert_reads_what_is_committed(store)
        assert finished.items() <= finished_files(store).items()
        finished = finished_files(store)
    write_all(tmp_path)
    assert finished.items() <= finished_files(store).items()
    assert files_of(store) == files_of(expected)
    assert verify_store(store).problems == ()


@pytest.fixture(scope="module")
def repaired(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: tuple[Path, int]
) -> tuple[Path, int]:
    """A damaged store after a repair that was left alone, and its number of file operations."""
    store = tmp_path_factory.mktemp("repaired") / uninterrupted[0].name
    damage_in_every_way(shutil.copytree(uninterrupted[0], store))
    code, operations = run_and_kill(lambda: repair_store(store), 0)
    assert code == 0
    return store, operations


def test_a_killed_repair_finishes_as_an_uninterrupted_one(
    kill_of_repair: int, tmp_path: Path, uninterrupted: tuple[Path, int], repaired: tuple[Path, int]
) -> None:
    expected, operations = repaired
    store = shutil.copytree(uninterrupted[0], tmp_path / expected.name)
    damage_in_every_way(store)
    chance = random.Random(kill_of_repair)
    for _ in range(2):
        run_and_kill(lambda: repair_store(store), chance.randint(1, operations))
        reader = StoreReader(store)
        for key in ("a1", "b0", "b1"):  # those that were never damaged
            assert_equals_the_clip(reader, key)
    repair_store(store)
    assert without_quarantine(files_of(store)) == without_quarantine(files_of(expected))
    assert repair_store(store).found == ()
    write_again(store)
    reader = StoreReader(store)
    assert reader.keys == ("a0", "a1", "a2", "b0", "b1")
    for key in reader.keys:
        assert_equals_the_clip(reader, key)


LARGE = ArraySpec(dtype="float32", shape=(4, 500, 1000), dimension_names=("t", "h", "w"))


def _write_large(root: Path) -> Path:
    settings = StoreSettings(kind="large", arrays={"frames": LARGE}, values={})
    writer = StoreWriter.open(root, settings, provenance={})
    for name in ("0", "1"):
        if not writer.is_committed(name):
            with writer.shard(name, source=name) as shard:
                for i in range(3):
                    if not shard.has(f"{name}{i}"):
                        shard.add(
                            f"{name}{i}",
                            {"frames": np.full(LARGE.shape, i, "float32")},
                            fingerprint=fingerprint_of(f"{name}{i}"),
                        )
                shard.commit()
    return writer.path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A store whose writing is mostly writing of large files, and the seconds it takes."""
    root = tmp_path_factory.mktemp("large")
    process = multiprocessing.get_context("fork").Process(target=_write_large, args=(root,))
    start = time.perf_counter()
    process.start()
    process.join()
    duration_s = time.perf_counter() - start
    (store,) = root.iterdir()
    return store, duration_s


def test_a_kill_in_the_middle_of_a_large_write_leaves_no_trace(
    timed_kill: int, tmp_path: Path, large: tuple[Path, float]
) -> None:
    expected, duration_s = large
    chance = random.Random(timed_kill)
    store = tmp_path / expected.name
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=_write_large, args=(tmp_path,))
        process.start()
        time.sleep(chance.uniform(0.0, duration_s))
        process.kill()
        process.join()
        try:
            reader = StoreReader(store)
        except StoreNotFound:
            continue
        assert len(reader) in (0, 3, 6)
        for key in reader.keys:
            assert (reader.read(key)["frames"] == int(key[1])).all()
    finished = finished_files(store)
    assert _write_large(tmp_path) == store
    assert finished.items() <= finished_files(store).items()
    assert files_of(store) == files_of(expected)
