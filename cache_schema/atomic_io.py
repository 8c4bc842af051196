"""Files that are complete or absent, also after a crash, and file locks."""

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from cache_schema.errors import LockLost, LockUnsupported, ShardBusy


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file or folder that the block writes into an `OSError` that names none.

    The system names files where they are opened or moved, not where bytes are written or synced.
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
        with naming(path):
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
    """Sync the directory `path` and every directory below it; what files hold is not meant."""
    if _sync_file_system(path):
        return
    for folder, _, _ in os.walk(path, topdown=False):
        sync(Path(folder))


def _sync_file_system(path: Path) -> bool:
    """Sync the whole file system of `path`, where the system can: thousands of folders at once."""
    syncfs = getattr(ctypes.CDLL(None), "syncfs", None)
    if syncfs is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(syncfs(descriptor) == 0)
    finally:
        os.close(descriptor)


def open_for_writing(path: Path) -> BinaryIO:
    """An empty file at `path`, open for writing; `OSError` where a symbolic link lies there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_whole(path: Path, data: bytes, *, temporary: Path) -> None:
    """Write `data` to `path` by way of `temporary`, so that `path` is never seen half-written.

    `temporary` lies on the same file system, and nobody else writes it at the same time.
    """
    with naming(path), open_for_writing(temporary) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def make_directories(path: Path) -> None:
    """Create the directory `path` and whatever is missing above it, durably."""
    if path.is_dir():
        return
    existing = next(folder for folder in path.parents if folder.is_dir())
    path.mkdir(parents=True, exist_ok=True)
    sync_upwards(path, existing)


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What `flock` fails with where a file system has no locks."""

_LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=all", "local_lock=flock"},
    "nfs4": {"nolock", "local_lock=all", "local_lock=flock"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
}
"""Mount options, by file system, with which other machines do not see a lock."""

_MOUNTS = Path("/proc/self/mountinfo")

_checked_devices: set[int] = set()
"""File systems on which locks were found to work, by `st_dev`."""


class FileLock:
    """Exclusive `flock` on a file that exists only while somebody writes.

    The file holds a random token of its holder, and is removed on release. A process that dies
    leaves it behind unlocked, which hinders nobody. Forked processes do not inherit the lock.

    A lock can be lost while it is held, when the file is deleted or a server forgets it: `check`
    finds that out, and `ShardClaim` says what holds then.
    """

    def __init__(self, path: Path, *, wait: bool, what: str) -> None:
        """Nothing is locked before `__enter__`.

        Args:
            path: the lock file; its folder exists.
            wait: wait for another holder; otherwise raise `ShardBusy`.
            what: the locked thing, for the message.
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
            LockUnsupported: the file system keeps no locks, or only within this machine.
        """
        while self._descriptor is None:
            descriptor = os.open(self._path, _FLAGS, 0o644)
            try:
                self._lock(descriptor)
                if self._is_current(descriptor):
                    _refuse_useless_locks(descriptor, self._path)
                    with naming(self._path):
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
        """Raise `LockLost` if the lock is not this process's any more."""
        if self._descriptor is None or not self._is_held(self._descriptor):
            raise LockLost(
                f"the lock {self._path} was deleted, or taken over by another process, while this "
                f"one held it to change {self._what}; run the same command again"
            )

    def leave_to_parent(self) -> None:
        """Let go of a lock that was held when this process was forked: it is the parent's."""
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
        """Whether the locked file is still the one at the path: its last holder may remove it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def _is_held(self, descriptor: int) -> bool:
        """Whether nobody has taken the lock since."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # again, if a server forgot it
        except OSError:
            return False
        try:  # opening it asks the server, while `stat` may know the path from before
            found = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            is_same = os.path.samestat(os.fstat(found), os.fstat(descriptor))
            return is_same and os.read(found, 64) == self._token
        finally:
            os.close(found)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            _held.discard(self)
            if self._is_held(self._descriptor):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


_held: set[FileLock] = set()
"""The locks of this process."""


def _leave_to_parent() -> None:
    while _held:
        _held.pop().leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock at this moment; false where that cannot be found out."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would wait
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
    """The error for a folder whose file system keeps no locks."""
    return LockUnsupported(
        f"the file system of {path.parent} keeps no file locks between processes and machines "
        f"({why}), so two writers could not keep apart there; mount it with locks (NFS without "
        "nolock and local_lock, Lustre with -o flock), or choose another folder, such as one on a "
        "local disk; stores that several machines have written so can be merged or copied"
    )


def _refuse_useless_locks(descriptor: int, path: Path) -> None:
    """`LockUnsupported` if a lock that is held keeps nobody out; once for each file system."""
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
        if os.path.sameopenfile(descriptor, second):  # and was not deleted meanwhile
            raise locks_unsupported(path, "two locks on one file were granted")
    finally:
        os.close(second)


def _local_lock_option(device: int) -> str | None:
    """The option with which a file system was mounted that keeps its locks to this machine."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    for line in mounts:
        # https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
        of_mount, _, of_system = line.partition(" - ")
        kind, _, options = of_system.split(" ", 2)
        if of_mount.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}":
            found = _LOCAL_LOCKS.get(kind, set()).intersection(options.split(","))
            if found:
                return min(found)
    return None
