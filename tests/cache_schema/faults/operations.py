"""Doing something to a program at its n-th file operation, as Python's audit events count them."""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

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

    def child() -> None:
        lock = threading.Lock()

        def count(event: str, args: tuple[Any, ...]) -> None:
            if event in OPERATIONS:
                with lock:
                    counted.value += 1
                    if counted.value == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        body()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, counted.value


@dataclass
class Outcome:
    """Of what was done while the disk filled up."""

    went_well: bool = False


class FullDisk:
    """An audit hook: from the n-th operation on that makes something, the disk is full.

    What was being made then lies there with its first few bytes.
    """

    MAKING = ("open", "os.mkdir", "os.rename", "os.link")

    def __init__(self) -> None:
        self.full_at = 0
        self.made = 0
        self._is_busy = False

    @contextlib.contextmanager
    def full_from(self, operation: int) -> Iterator["Outcome"]:
        """Swallow the error of the full disk, and no other."""
        outcome = Outcome()
        self.made, self.full_at = 0, operation
        try:
            yield outcome
            outcome.went_well = True
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            self.full_at = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.full_at or self._is_busy or event not in self.MAKING:
            return
        if event == "open" and not self._for_writing(args):
            return
        self.made += 1
        if self.made >= self.full_at:
            if event == "open" and self.made == self.full_at:
                self._tear(args[0])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    def _for_writing(self, args: tuple[Any, ...]) -> bool:
        flags = args[2]
        return isinstance(args[0], str | os.PathLike) and bool(
            flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )

    def _tear(self, path: Any) -> None:
        self._is_busy = True
        Path(path).write_bytes(b"{\n ")
        self._is_busy = False
