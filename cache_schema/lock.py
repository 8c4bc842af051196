"""One writer at a time: a file lock that dies with its process; used by the writer's modules."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from cache_schema.errors import ShardBusy

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class FileLock:
    """Exclusive `flock` on a file that exists only while somebody writes.

    The file is removed on release. A process that dies leaves it behind unlocked, which hinders
    nobody. The file system must support `flock` between the machines that write to one store.
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

    def __enter__(self) -> "FileLock":
        while self._descriptor is None:
            descriptor = os.open(self._path, _FLAGS, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                raise ShardBusy(
                    f"{self._what} is being written by another process (it holds the lock "
                    f"{self._path}); wait for it, or give each process its own shards"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)
        return self

    def _is_current(self, descriptor: int) -> bool:
        """Whether the locked file is still the one at the path: its last holder may remove it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
