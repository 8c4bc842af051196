"""Threads that work ahead of, or behind, the main one, and never keep the process from ending.

Whoever waits for one of them waits for a limited time.
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long one item, such as decoding or writing a clip, may take before it counts as stuck."""

LAST_WAIT_S = 5.0
"""How long a thread that is stuck is waited for once its work has been given up."""


class DaemonPool:
    """Runs calls in threads that an interpreter does not wait for at its end.

    `ThreadPoolExecutor`'s would keep a process alive for as long as one of them is stuck.
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
        """Have `function(*arguments)` called by one of the threads."""
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
            except BaseException as error:  # raised by whoever asks for the result
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
        """Wait for calls under way, not for long where something is stuck; make no others."""
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
            thread.join(LAST_WAIT_S if isinstance(error, TimeoutError) else PATIENCE_S)


def result_of(future: "Future[T]", what: str) -> T:
    """What a call returned or raised, once it has.

    Args:
        what: named where it does not come: "decoding clip 'a'".

    Raises:
        TimeoutError: nothing came within `PATIENCE_S`.
    """
    done, _ = concurrent.futures.wait([future], timeout=PATIENCE_S)
    if not done:
        raise stuck(what)
    return future.result()


def stuck(what: str) -> TimeoutError:
    """The error of work that has not come to an end."""
    return TimeoutError(
        f"{what} has taken more than {PATIENCE_S:g} s: the storage does not answer, or the file "
        "cannot be read to its end; see to it, and run the same command again"
    )
