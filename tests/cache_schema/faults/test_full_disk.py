"""Disks that fill up at any write: a clear error, committed clips readable, and a rerun finishes.

Once on a file system that is really full (where one can be mounted), and always with the error
injected: from the n-th file operation on nothing can be made, and what was being made lies there
with its first few bytes.
"""

import errno
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache_schema import verify_store
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.faults.operations import count_writes, exit_code, run_with_full_disk
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    assert_reads_what_is_committed,
    damage_in_every_way,
    finished_files,
    without_quarantine,
    write_all,
)
from tests.cache_schema.made_stores import files_of

Mount = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Mount, or mount again with other limits, a small file system in memory."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> Path:
        if path.is_mount():
            options = f"remount,{options}"
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
        return path

    yield mount
    if path.is_mount():
        subprocess.run(["umount", path], check=True)


def _fill_then_make_room(mount: Mount, small: str, expected: Path) -> None:
    root = mount(small)
    store = root / SETTINGS.folder_name
    assert exit_code(functools.partial(write_all, root)) == errno.ENOSPC
    assert_reads_what_is_committed(store)
    finished = finished_files(store)
    mount("size=4m,nr_inodes=1000")
    write_all(root)
    assert finished.items() <= finished_files(store).items()
    assert files_of(store) == files_of(expected)
    assert verify_store(store).problems == ()


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run with room enough."""
    return write_all(tmp_path_factory.mktemp("roomy"))


@pytest.fixture(scope="module")
def needed_pages(roomy: Path) -> int:
    """Most blocks of 4 KiB that writing holds at one time, at least."""
    return sum(-(-path.stat().st_size // 4096) for path in roomy.rglob("*") if path.is_file())


def test_a_full_disk_loses_nothing(
    free_pages: int, disk: Mount, roomy: Path, needed_pages: int
) -> None:
    step = max(1, needed_pages // 6)
    pages = 1 + (free_pages * step if free_pages < 6 else free_pages) % (needed_pages - 1)
    _fill_then_make_room(disk, f"size={pages * 4}k,nr_inodes=1000", roomy)


def test_a_disk_without_free_inodes_loses_nothing(
    free_inodes: int, disk: Mount, roomy: Path
) -> None:
    needed = sum(1 for _ in roomy.rglob("*"))
    inodes = 4 + (free_inodes * 13) % (needed - 4)
    _fill_then_make_room(disk, f"size=4m,nr_inodes={inodes}", roomy)


def _points(request: pytest.FixtureRequest, body: Callable[[], object], step: int) -> range:
    """Every write of `body`, or every `step`-th: a full disk at any of them ends it."""
    step = 1 if request.config.getoption("--full-faults") else step
    return range(1, 1 + count_writes(body), step)


@pytest.mark.timeout(3600)
def test_an_error_at_any_write_loses_nothing(
    tmp_path: Path, roomy: Path, request: pytest.FixtureRequest
) -> None:
    expected = files_of(roomy)
    whole = tmp_path / "whole"
    whole.mkdir()  # as below: making it would be one write more
    for full_at in _points(request, functools.partial(write_all, whole), 37):
        root = tmp_path / str(full_at)
        root.mkdir()
        store = root / SETTINGS.folder_name
        assert not run_with_full_disk(functools.partial(write_all, root), full_at)
        assert_reads_what_is_committed(store)
        finished = finished_files(store)
        write_all(root)
        assert finished.items() <= finished_files(store).items()
        assert files_of(store) == expected


@pytest.mark.timeout(3600)
def test_an_error_at_any_write_of_a_repair_loses_nothing(
    tmp_path: Path, roomy: Path, request: pytest.FixtureRequest
) -> None:
    whole = damage_in_every_way(shutil.copytree(roomy, tmp_path / "repaired" / roomy.name))
    points = _points(request, functools.partial(repair_store, whole), 29)
    expected = without_quarantine(files_of(whole))
    for full_at in points:
        store = shutil.copytree(roomy, tmp_path / str(full_at) / roomy.name)
        damage_in_every_way(store)
        assert not run_with_full_disk(functools.partial(repair_store, store), full_at)
        repair_store(store)
        assert without_quarantine(files_of(store)) == expected
