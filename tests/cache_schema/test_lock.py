"""File locks: refused where the file system does not keep them."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from cache_schema import LockUnsupported, StoreSettings, StoreWriter, lock


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_checked_devices", set())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_with_its_path(
    tmp_path: Path, settings: StoreSettings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(LockUnsupported, match=rf"{tmp_path}.*{os.strerror(number)}.*mount it"):
        StoreWriter.open(tmp_path, settings, provenance={})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_system_that_grants_every_lock_is_refused(
    tmp_path: Path, settings: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(LockUnsupported, match=f"{tmp_path}.*two locks on one file"):
        StoreWriter.open(tmp_path, settings, provenance={})
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
    tmp_path: Path,
    settings: StoreSettings,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: str,
    refused: str | None,
) -> None:
    device = tmp_path.stat().st_dev
    of_mount = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"22 27 0:999999 / /proc rw - proc proc rw\n{of_mount} - {kind} a:/b {options}\n"
    )
    monkeypatch.setattr(lock, "_MOUNTS", mounts)
    if refused is None:
        StoreWriter.open(tmp_path / "cache", settings, provenance={})
        return
    with pytest.raises(LockUnsupported, match=f"{tmp_path}.*mounted with {refused}"):
        StoreWriter.open(tmp_path / "cache", settings, provenance={})
