"""Atomic file writes, `fsync` helpers and file locks."""

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cache_schema.errors import LockLost, LockUnsupported, ShardBusy


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add the path of the file or folder written in the block to any `OSError` without one.

    The operating system reports a path when a file is opened or moved, but not when it is written
    or synced.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with add_path_to_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_upwards(path: Path, root: Path) -> None:
    """Sync the directory `path` and its parents up to and including `root`."""
    sync(path)
    while path != root:
        path = path.parent
        sync(path)


def sync_folders(path: Path) -> None:
    """Sync the directory `path` and every directory below it, but not the contents of files."""
    if _sync_file_system(path):
        return
    for folder, _, _ in os.walk(path, topdown=False):
        sync(Path(folder))


def _sync_file_system(path: Path) -> bool:
    """Sync the whole file system of `path` where `syncfs` exists; fast for thousands of folders."""
    syncfs = getattr(ctypes.CDLL(None), "syncfs", None)
    if syncfs is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(syncfs(descriptor) == 0)
    finally:
        os.close(descriptor)


def open_for_writing(path: Path) -> BinaryIO:
    """Open an empty file at `path` for writing; `OSError` if it is a symbolic link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_atomic(path: Path, data: bytes, *, temporary: Path | None = None) -> None:
    """Write `data` to `temporary` and rename it to `path`, which is never seen partly written.

    `temporary` must be on the same file system and have no other writer; None uses
    `.<name>.partial` beside `path`.
    """
    temporary = temporary or path.with_name(f".{path.name}.partial")
    with add_path_to_errors(path), open_for_writing(temporary) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def make_directories(path: Path) -> None:
    """Create the directory `path` and its missing parents, and sync them."""
    if path.is_dir():
        return
    existing = next(folder for folder in path.parents if folder.is_dir())
    path.mkdir(parents=True, exist_ok=True)
    sync_upwards(path, existing)


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Error numbers of `flock` on file systems without locks."""

_LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=all", "local_lock=flock"},
    "nfs4": {"nolock", "local_lock=all", "local_lock=flock"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
}
"""Mount options, by file system, that make locks invisible to other machines."""

_MOUNTS = Path("/proc/self/mountinfo")

_checked_devices: set[int] = set()
"""File systems whose locks are known to work, by `st_dev`."""


class FileLock:
    """Exclusive `flock` on a file that exists only while the lock is held.

    The file contains a random token of the holder and is removed on release. A process that dies
    leaves the file unlocked, so it blocks nobody. Forked processes do not inherit the lock.

    A lock can be lost while it is held, when the file is deleted or a server forgets the lock.
    `check` detects this; `ShardClaim` describes the consequences.
    """

    def __init__(self, path: Path, *, wait: bool, what: str) -> None:
        """Prepare the lock; `__enter__` takes it.

        Args:
            path: the lock file; its folder must exist.
            wait: wait for another holder; otherwise raise `ShardBusy`.
            what: name of the locked object, for error messages.
        """
        self._path = path
        self._wait = wait
        self._what = what
        self._descriptor: int | None = None
        self._token = secrets.token_hex(8).encode("ascii")

    def __enter__(self) -> "FileLock":
        """Take the lock.

        Raises:
            ShardBusy: another process holds it, and `wait` is false.
            LockUnsupported: the file system does not support locks, or only within this machine.
        """
        while self._descriptor is None:
            descriptor = os.open(self._path, _FLAGS, 0o644)
            try:
                self._lock(descriptor)
                if self._is_current(descriptor):
                    _check_locks_are_shared(descriptor, self._path)
                    with add_path_to_errors(self._path):
                        os.pwrite(descriptor, self._token, 0)
                    self._descriptor = descriptor
                    _held.add(self)
            except LockUnsupported:
                self._path.unlink(missing_ok=True)
                raise
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        return self

    def check(self) -> None:
        """Raise `LockLost` if this process no longer holds the lock."""
        if self._descriptor is None or not self._is_held(self._descriptor):
            raise LockLost(
                f"the lock {self._path} was deleted, or taken over by another process, while this "
                f"process held it to change {self._what}; run the same command again"
            )

    def release_in_child(self) -> None:
        """Close the descriptor in a forked child; the lock stays with the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ShardBusy(
                f"{self._what} is being written by another process (it holds the lock "
                f"{self._path}); wait for it, or give each process its own shards"
            ) from None
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise locks_unsupported(self._path, os.strerror(error.errno)) from error
            raise

    def _is_current(self, descriptor: int) -> bool:
        """Whether the path still refers to the locked file; the last holder may have removed it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def _is_held(self, descriptor: int) -> bool:
        """Whether the lock file is still this process's."""
        try:
            fcntl.flock(
                descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # take it again if a server forgot it
        except OSError:
            return False
        try:  # opening contacts the server; `stat` may be answered from a cache
            found = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            is_same = os.path.samestat(os.fstat(found), os.fstat(descriptor))
            return is_same and os.read(found, 64) == self._token
        finally:
            os.close(found)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            _held.discard(self)
            if self._is_held(self._descriptor):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


_held: set[FileLock] = set()
"""Locks held by this process."""


def _release_in_child() -> None:
    while _held:
        _held.pop().release_in_child()


os.register_at_fork(after_in_child=_release_in_child)


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock now; false if that cannot be determined."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a FIFO would block
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO):
            return False
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def locks_unsupported(path: Path, why: str) -> LockUnsupported:
    """The error for a folder whose file system does not support locks."""
    return LockUnsupported(
        f"the file system of {path.parent} does not support file locks between processes and "
        f"machines ({why}), so concurrent writers cannot be excluded; mount it with locks (NFS "
        "without nolock and local_lock, Lustre with -o flock), or use another folder, such as one "
        "on a local disk; stores that several machines write to local disks can be merged or copied"
    )


def _check_locks_are_shared(descriptor: int, path: Path) -> None:
    """Raise `LockUnsupported` if a held lock excludes nobody; checked once per file system."""
    device = os.fstat(descriptor).st_dev
    if device in _checked_devices:
        return
    option = _local_lock_option(device)
    if option is not None:
        raise locks_unsupported(path, f"it is mounted with {option}")
    second = os.open(path, _FLAGS, 0o644)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _checked_devices.add(device)
    else:
        if os.path.sameopenfile(descriptor, second):  # the file was not deleted meanwhile
            raise locks_unsupported(path, "two locks on one file were granted")
    finally:
        os.close(second)


def _local_lock_option(device: int) -> str | None:
    """The mount option that keeps locks local to this machine, or None."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    for line in mounts:
        # https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
        mount_fields, _, file_system_fields = line.partition(" - ")
        kind, _, options = file_system_fields.split(" ", 2)
        if mount_fields.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}":
            found = _LOCAL_LOCKS.get(kind, set()).intersection(options.split(","))
            if found:
                return min(found)
    return None
