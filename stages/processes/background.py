"""Daemon threads for prefetching and background writing; they never block process exit.

Every wait for one of them has a timeout.
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

TIMEOUT_S = 600.0
"""Timeout of one item, such as decoding or writing a clip."""

SHUTDOWN_TIMEOUT_S = 5.0
"""Timeout for joining a thread after its work has timed out."""


class DaemonPool:
    """Thread pool of daemon threads.

    `ThreadPoolExecutor` is not used, since the interpreter joins its threads at exit and would hang
    on a stuck one.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Schedule `function(*arguments)` on one of the threads."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as error:  # raised again by `Future.result`
                future.set_exception(error)
            else:
                future.set_result(result)
            del call, future, function

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel pending calls and wait for running ones, only briefly after a timeout."""
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(SHUTDOWN_TIMEOUT_S if isinstance(error, TimeoutError) else TIMEOUT_S)


def result_of(future: "Future[T]", what: str) -> T:
    """Wait for a call and return its result, or raise its exception.

    Args:
        future: the call.
        what: description for the timeout message, such as "decoding clip 'a'".

    Raises:
        TimeoutError: the call has not finished within `TIMEOUT_S`.
    """
    done, _ = concurrent.futures.wait([future], timeout=TIMEOUT_S)
    if not done:
        raise timeout_error(what)
    return future.result()


def timeout_error(what: str) -> TimeoutError:
    """The error for work that exceeded `TIMEOUT_S`."""
    return TimeoutError(
        f"{what} has taken more than {TIMEOUT_S:g} s: the storage does not respond, or the file "
        "cannot be read to its end; check both, then run the same command again"
    )
