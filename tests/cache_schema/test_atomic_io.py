"""File locks, and file systems on which they do not work."""

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from cache_schema import LockLost, LockUnsupported, ShardBusy, StoreWriter, atomic_io
from cache_schema.atomic_io import FileLock
from tests.cache_schema.made_stores import SETTINGS


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "_checked_devices", set())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_refused_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(LockUnsupported, match=rf"{tmp_path}.*{os.strerror(number)}.*mount it"):
        StoreWriter.open(tmp_path, SETTINGS, provenance={})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_system_that_grants_every_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(LockUnsupported, match=f"{tmp_path}.*two locks on one file"):
        StoreWriter.open(tmp_path, SETTINGS, provenance={})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [
        ("nfs", "rw,vers=3,nolock,proto=tcp,local_lock=all,addr=10.0.0.1", "local_lock=all"),
        ("nfs4", "rw,vers=4.2,local_lock=none,addr=10.0.0.1", None),
        ("lustre", "rw,localflock,lazystatfs", "localflock"),
        ("lustre", "rw,flock,lazystatfs", None),
        ("ext4", "rw,nolock", None),
    ],
)
def test_locks_that_other_machines_do_not_see_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, refused: str | None
) -> None:
    device = tmp_path.stat().st_dev
    of_mount = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"22 27 0:999999 / /proc rw - proc proc rw\n{of_mount} - {kind} a:/b {options}\n"
    )
    monkeypatch.setattr(atomic_io, "_MOUNTS", mounts)
    if refused is None:
        StoreWriter.open(tmp_path / "cache", SETTINGS, provenance={})
        return
    with pytest.raises(LockUnsupported, match=f"{tmp_path}.*mounted with {refused}"):
        StoreWriter.open(tmp_path / "cache", SETTINGS, provenance={})


def _lock_of(path: Path) -> FileLock:
    return FileLock(path, wait=False, what="a thing")


def _forget_lock(path: Path) -> None:
    """As a server does after a restart: the lock is gone, its holder's file stays open."""
    for link in Path("/proc/self/fd").iterdir():
        if link.resolve() == path:
            fcntl.flock(int(link.name), fcntl.LOCK_UN)


def test_a_lock_that_another_process_took_over_is_lost_even_after_that_one_was_killed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"

    def take_and_die() -> None:
        _lock_of(path).__enter__()
        os._exit(0)  # leaves the file behind

    with _lock_of(path) as held:
        held.check()
        _forget_lock(path)
        process = multiprocessing.get_context("fork").Process(target=take_and_die)
        process.start()
        process.join()
        assert process.exitcode == 0
        with pytest.raises(LockLost, match=rf"{path} was deleted, or taken over.*a thing"):
            held.check()
    assert path.exists()  # it is the other one's


def test_a_lock_that_was_forgotten_and_not_taken_is_held_again(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with _lock_of(path) as held:
        _forget_lock(path)
        held.check()
        with pytest.raises(ShardBusy), _lock_of(path):
            pass
        _forget_lock(path)
        with _lock_of(path), pytest.raises(LockLost):
            held.check()
        path.unlink(missing_ok=True)
        with pytest.raises(LockLost):
            held.check()


def test_a_process_forked_from_a_holder_that_was_killed_does_not_keep_the_lock(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.close(writing)
        _lock_of(path).__enter__()
        if os.fork() == 0:
            os.read(reading, 1)  # until the test ends
        os._exit(0)
    os.waitpid(holder, 0)
    assert path.exists()
    with _lock_of(path):
        pass
    os.close(writing)
    os.close(reading)
