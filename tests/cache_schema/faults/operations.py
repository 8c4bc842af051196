"""Doing something to a program at its n-th file operation, as Python's audit events count them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
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
