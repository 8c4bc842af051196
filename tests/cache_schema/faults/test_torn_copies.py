"""Interrupted copies, and copies made while the store was written: never misread."""

import multiprocessing
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cache_schema import CacheError, StoreNotFound, StoreReader, StoreWriter, verify_store
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    SHARDS,
    assert_equals_the_clip,
    write_again,
    write_all,
)

KEYS = tuple(sorted(key for keys in SHARDS.values() for key in keys))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("whole"))


def _copy_some_files(source: Path, target: Path, chance: random.Random) -> None:
    """File by file in any order, up to some byte of some file."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    chance.shuffle(files)
    files = files[: chance.randint(1, len(files))]
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    data = copy.read_bytes()
    copy.write_bytes(data[: chance.randrange(len(data))])


def _copy_while_written(root: Path, target: Path, chance: random.Random) -> None:
    """As somebody does who does not know that a writer is at work."""
    process = multiprocessing.get_context("fork").Process(target=write_all, args=(root,))
    process.start()
    time.sleep(chance.uniform(0.0, 0.15))
    subprocess.run(["cp", "-r", root / SETTINGS.folder_name, target], capture_output=True)
    process.join()
    assert process.exitcode == 0


def test_a_torn_copy_is_never_misread_and_can_be_completed(
    copy: int, tmp_path: Path, whole: Path
) -> None:
    chance = random.Random(copy)
    store = tmp_path / "copy" / whole.name
    store.parent.mkdir()
    if copy % 3:
        _copy_some_files(whole, store, chance)
    else:
        _copy_while_written(tmp_path / "source", store, chance)

    try:
        reader = StoreReader(store)
        keys = list(reader.keys)
        assert set(keys) <= set(KEYS)
    except CacheError:
        keys = []
    damaged = set()
    for key in keys:
        try:
            assert_equals_the_clip(reader, key)
        except CacheError:
            damaged.add(key)

    try:
        found = verify_store(store).problems
    except StoreNotFound:
        StoreWriter.open(store.parent, SETTINGS, provenance={"version": "1.2.3"})
        found = verify_store(store).problems
    except CacheError:
        assert (store / "store.json").exists()  # cut off
        found = ()
    named = {problem.key for problem in found}
    for shard, keys_of_shard in SHARDS.items():
        # The index, if it is whole, gives clips of a shard whose record is cut off.
        if any(f"commits/{shard}.json" in problem.what for problem in found):
            named.update(keys_of_shard)
    assert damaged <= named

    repair_store(store)  # takes a damaged store.json out
    StoreWriter.open(store.parent, SETTINGS, provenance={"version": "1.2.3"})
    repair_store(store)
    assert {problem.remedy for problem in verify_store(store).problems} <= {"extract"}
    write_all(store.parent)
    write_again(store)
    assert verify_store(store).problems == ()
    reader = StoreReader(store)
    assert reader.keys == KEYS
    for key in KEYS:
        assert_equals_the_clip(reader, key)
