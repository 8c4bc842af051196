"""Read-only caches: reading works, writing raises a clear error and changes nothing."""

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_schema import StoreWriter, verify_store
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    assert_reads_what_is_committed,
    clip_of,
    damage_in_every_way,
    finished_files,
    write_all,
    write_shard,
)
from tests.cache_schema.made_stores import files_of
from tests.fingerprints import fingerprint_of


class _Cache:
    """A folder that can be made read-only, also for root, who is asked for no permissions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._is_mounted = False
        if os.geteuid() == 0:
            made = subprocess.run(["mount", "--bind", path, path], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"root can write everywhere, and cannot mount: {made.stderr.strip()}")
            self._is_mounted = True

    def set_read_only(self, read_only: bool) -> None:
        if self._is_mounted:
            mode = "ro" if read_only else "rw"
            subprocess.run(["mount", "-o", f"remount,bind,{mode}", self.path], check=True)
            return
        for path in [self.path, *self.path.rglob("*")]:
            mode_bits = path.stat().st_mode
            path.chmod(mode_bits & ~0o222 if read_only else mode_bits | stat.S_IWUSR)

    def close(self) -> None:
        self.set_read_only(False)
        if self._is_mounted:
            subprocess.run(["umount", self.path], check=True)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[_Cache]:
    cache = _Cache(tmp_path / "cache")
    yield cache
    cache.close()


def _assert_refused(error: OSError, path: Path) -> None:
    assert error.errno in (errno.EROFS, errno.EACCES)
    assert str(path) in str(error)


def test_a_finished_store_reads_and_verifies_where_nothing_can_be_written(cache: _Cache) -> None:
    store = write_all(cache.path)
    before = files_of(store)
    cache.set_read_only(True)
    assert_reads_what_is_committed(store)
    assert verify_store(store).problems == ()
    assert files_of(store) == before


def test_writing_where_nothing_can_be_written_names_the_place_and_changes_nothing(
    cache: _Cache,
) -> None:
    store = write_all(cache.path)
    before = files_of(store)
    cache.set_read_only(True)
    with pytest.raises(OSError) as error:
        StoreWriter.open(cache.path, SETTINGS, provenance={})
    _assert_refused(error.value, store)
    cache.set_read_only(False)
    assert files_of(store) == before


def test_a_repair_where_nothing_can_be_written_names_the_place_and_changes_nothing(
    cache: _Cache,
) -> None:
    store = damage_in_every_way(write_all(cache.path))
    before = files_of(store)
    cache.set_read_only(True)
    assert len(verify_store(store).problems) > 4
    with pytest.raises(OSError) as error:
        repair_store(store)
    _assert_refused(error.value, store)
    assert files_of(store) == before


def test_a_folder_that_becomes_read_only_in_mid_shard_loses_nothing(
    cache: _Cache, tmp_path: Path
) -> None:
    expected = write_all(tmp_path / "uninterrupted")
    writer = StoreWriter.open(cache.path, SETTINGS, provenance={"version": "1.2.3"})
    write_shard(writer, "00000")
    with writer.shard("00001", source="00001.tar") as shard:
        shard.add("b0", clip_of("b0"), {"source_fps": 29.97}, fingerprint=fingerprint_of("b0"))
    finished = finished_files(writer.path)
    cache.set_read_only(True)
    with pytest.raises(OSError) as error, writer.shard("00001", source="00001.tar"):
        pass
    _assert_refused(error.value, writer.path)
    assert_reads_what_is_committed(writer.path)
    cache.set_read_only(False)
    write_all(cache.path)
    assert finished.items() <= finished_files(writer.path).items()
    assert files_of(writer.path) == files_of(expected)
