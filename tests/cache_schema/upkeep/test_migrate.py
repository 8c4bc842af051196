"""A store that the code of schema version 1 wrote, brought to version 2 in place."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    CorruptRecord,
    ShardBusy,
    StoreNotFound,
    StoreReader,
    StoreWriter,
    UnknownSchemaVersion,
)
from cache_schema.layout import StoreLayout
from cache_schema.lock import FileLock
from cache_schema.upkeep.migrate import MigrationReport, migrate_store
from tests.cache_schema.faults.operations import run_and_kill

FilesOf = Callable[[Path], dict[str, bytes]]

STORES_V1 = Path(__file__).parents[1] / "stores_v1"
NAME = "teacher-848ee747cab8"
KEYS = ["walk/0000", "walk/0001", "run/0000", "walk/0002"]  # see VALUES.md


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    return shutil.copytree(STORES_V1 / NAME, tmp_path / "cache" / NAME)


def _assert_holds_everything(store: Path) -> None:
    reader = StoreReader(store, kind="teacher")
    assert sorted(reader.keys) == sorted(KEYS)
    for n, key in enumerate(KEYS):
        found = reader.read(key)
        features = np.random.default_rng(n).normal(size=(5, 2, 3, 4)).astype("float16")
        valid = np.random.default_rng(100 + n).integers(0, 2, size=5).astype("uint8")
        np.testing.assert_array_equal(found["features"], features)
        np.testing.assert_array_equal(found["valid"], valid)


def _assert_refused_with_the_command(store: Path) -> None:
    with pytest.raises(UnknownSchemaVersion, match=f"cache migrate {store}$"):
        StoreReader(store)


def test_an_old_store_is_refused_and_then_holds_what_it_held(old_store: Path) -> None:
    _assert_refused_with_the_command(old_store)
    assert migrate_store(old_store) == MigrationReport(num_records=4, num_clips=4)
    _assert_holds_everything(old_store)
    reader = StoreReader(old_store)
    assert reader.settings.folder_name == NAME
    assert reader.provenance == {"sam2videox": "0.1.0"}
    assert reader.record("walk/0000").attributes == {"source_fps": 24.0, "name": "walk/0000"}


def test_only_records_change_and_each_in_what_version_2_adds(
    old_store: Path, files_of: FilesOf
) -> None:
    before = files_of(old_store)
    migrate_store(old_store)
    after = files_of(old_store)
    groups = {path: data for path, data in before.items() if path.startswith("shards/")}
    assert groups.items() <= after.items()
    assert after.keys() - before.keys() == {"index.npz"}
    for path in ("store.json", *(f"commits/{n}.json" for n in ("00000", "00000-retry1", "00001"))):
        old, new = json.loads(before[path]), json.loads(after[path])
        assert (old.pop("schema_version"), new.pop("schema_version")) == (1, 2)
        assert old.pop("crc32c") != new.pop("crc32c")
        if path == "store.json":
            assert [spec.pop("compression") for spec in new["arrays"].values()] == ["none"] * 2
        else:
            assert new.pop("generation") == 0
        assert old == new


def test_what_a_killed_writer_staged_is_swept_and_written_again(old_store: Path) -> None:
    assert (old_store / ".staging/00002").is_dir()
    migrate_store(old_store)
    assert list((old_store / ".staging").iterdir()) == []
    settings = StoreReader(old_store).settings
    writer = StoreWriter.open(old_store.parent, settings, provenance={})
    with writer.shard("00002", source="00002.tar") as shard:
        assert not shard.has("left/0000")


def test_a_second_run_changes_nothing(old_store: Path, files_of: FilesOf) -> None:
    migrate_store(old_store)
    settings = StoreReader(old_store).settings
    writer = StoreWriter.open(old_store.parent, settings, provenance={})
    with writer.shard("00002", source="00002.tar") as shard:
        shard.skip("left/0000", "too_short", "staged by a writer of version 2")
    before = files_of(old_store)
    assert migrate_store(old_store) == MigrationReport(num_records=0, num_clips=4)
    assert files_of(old_store) == before


def test_a_record_that_an_old_writer_brought_in_later_is_migrated_too(old_store: Path) -> None:
    late = old_store / "commits/00001.json"
    record = late.read_bytes()
    late.unlink()
    migrate_store(old_store)
    late.write_bytes(record)
    with pytest.raises(UnknownSchemaVersion, match=f"cache migrate {old_store}$"):
        assert StoreReader(old_store).keys
    assert migrate_store(old_store).num_records == 1
    _assert_holds_everything(old_store)


def test_a_writer_at_work_stops_it(old_store: Path, files_of: FilesOf) -> None:
    layout = StoreLayout(old_store)
    for shard in ("00000", "00002"):  # whether its record is there already or not
        with FileLock(layout.lock(shard), wait=False, what="shard"):
            before = files_of(old_store)
            with pytest.raises(ShardBusy, match=f"shard '{shard}' of .* another process"):
                migrate_store(old_store)
            assert files_of(old_store) == before
    migrate_store(old_store)
    _assert_holds_everything(old_store)


@pytest.mark.parametrize("name", ["store.json", "commits/00001.json"])
def test_a_damaged_record_stops_it_before_anything_changes(
    old_store: Path, files_of: FilesOf, name: str
) -> None:
    data = bytearray((old_store / name).read_bytes())
    data[data.index(b"0", 200)] ^= 1
    (old_store / name).write_bytes(data)
    before = files_of(old_store)
    with pytest.raises(CorruptRecord, match=f"{name} .*checksum"):
        migrate_store(old_store)
    assert files_of(old_store) == before


def test_a_folder_without_a_store_and_a_newer_store_are_refused(
    old_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreNotFound, match="it has no store"):
        migrate_store(tmp_path)
    assert not (tmp_path / ".staging").exists()
    record = old_store / "store.json"
    newer = record.read_text().replace('"schema_version": 1', '"schema_version": 3')
    record.write_text(newer)
    with pytest.raises(UnknownSchemaVersion, match=r"version 3.* reads 2; update this package"):
        migrate_store(old_store)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A store after a migration that was left alone, and the number of its file operations."""
    store = shutil.copytree(STORES_V1 / NAME, tmp_path_factory.mktemp("migrated") / NAME)
    code, operations = run_and_kill(functools.partial(migrate_store, store), 0)
    assert code == 0
    assert operations > 30
    return store, operations


def test_wherever_a_migration_is_killed_no_reader_is_misled_and_a_rerun_finishes(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    uninterrupted: tuple[Path, int],
    files_of: FilesOf,
) -> None:
    expected, operations = uninterrupted
    step = 1 if request.config.getoption("--full-faults") else operations // 20
    for kill_at in range(1, operations + 1, step):
        store = shutil.copytree(STORES_V1 / NAME, tmp_path / str(kill_at) / NAME)
        code, _ = run_and_kill(functools.partial(migrate_store, store), kill_at)
        assert code == -9
        try:
            _assert_holds_everything(store)
        except UnknownSchemaVersion:
            _assert_refused_with_the_command(store)
        migrate_store(store)
        _assert_holds_everything(store)
        assert files_of(store) == files_of(expected)
