"""Kill a program, or let it fail, at its n-th file operation, counted by Python's audit events."""

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

Hook = Callable[[str, tuple[Any, ...]], None]

OPERATIONS = (
    "open",
    "os.rename",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
)


def run_and_kill(body: Callable[[], object], kill_at: int) -> tuple[int, int]:
    """Exit code of a forked child running `body`, and the file operations it got to.

    It sends itself SIGKILL at operation `kill_at`, counted from 1; at none if that is 0.
    """
    counted = RawValue("q", 0)  # no lock that a killed child could keep

    def count(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            with lock:
                counted.value += 1
                if counted.value == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    lock = threading.Lock()
    return exit_code(body, count), counted.value


def run_with_full_disk(body: Callable[[], object], full_from: int) -> bool:
    """Whether `body` ran to its end in a forked child whose disk is full from some operation on.

    Otherwise it must have ended with the error that says so. The child ends with it: Zarr's threads
    would go on writing for a moment.
    """
    code = exit_code(body, _FullDisk(full_from))
    assert code in (0, errno.ENOSPC)
    return code == 0


def count_writes(body: Callable[[], object]) -> int:
    """The file operations of `body`, run in a forked child, that `run_with_full_disk` counts."""
    disk = _FullDisk(sys.maxsize)
    assert exit_code(body, disk) == 0
    return int(disk.made.value)


def exit_code(body: Callable[[], object], hook: Hook | None = None) -> int:
    """Of a forked child running `body`: the number of an `OSError` that it raised, or 0."""

    def child() -> None:
        if hook is not None:
            sys.addaudithook(hook)  # cannot be taken away again, hence a process of its own
        try:
            body()
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


class _FullDisk:
    """An audit hook: from the n-th operation on that makes something, the disk is full.

    What was being made then lies there with its first few bytes.
    """

    MAKING = ("open", "os.mkdir", "os.rename", "os.link")

    def __init__(self, full_from: int) -> None:
        self._full_from = full_from
        self.made = RawValue("q", 0)
        self._lock = threading.RLock()
        self._is_tearing = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in self.MAKING or (event == "open" and not self._for_writing(args)):
            return
        with self._lock:
            if self._is_tearing:
                return
            self.made.value += 1
            if self.made.value < self._full_from:
                return
            if event == "open" and self.made.value == self._full_from:
                self._tear(args[0])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    def _for_writing(self, args: tuple[Any, ...]) -> bool:
        flags = args[2]
        return isinstance(args[0], str | os.PathLike) and bool(
            flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )

    def _tear(self, path: Any) -> None:
        self._is_tearing = True
        Path(path).write_bytes(b"{\n ")
        self._is_tearing = False
