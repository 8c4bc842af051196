"""Threads that read and map items ahead of the model, and write its results behind it."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from types import TracebackType
from typing import Generic, Self, TypeVar

from stages.processes import background
from stages.processes.background import DaemonPool, result_of

Item = TypeVar("Item")
Made = TypeVar("Made")

_POLL_S = 0.1
_WRITING = "writing a clip into the cache"


def prefetch(items: Iterable[Item], *, ahead: int = 1) -> Generator[Item, None, None]:
    """Yield the items in order while a thread reads up to `ahead` further ones.

    An exception of the iterator is raised in its place. Closing the returned generator stops the
    thread after its current item, with a short wait.

    Raises:
        TimeoutError: An item takes longer than `background.TIMEOUT_S`.
    """
    slots: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def put(tag: str, value: Item | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                slots.put((tag, value), timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:  # raised again in the consumer
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                tag, value = slots.get(timeout=background.TIMEOUT_S)
            except queue.Empty:
                raise background.timeout_error("reading the next clip's record") from None
            if tag == "end":
                return
            if tag == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join(background.SHUTDOWN_TIMEOUT_S)


def prefetch_map(
    function: Callable[[Item], Made],
    items: Iterable[Item],
    *,
    ahead: int,
    threads: int,
    describe: Callable[[Item], str],
) -> Generator[Made, None, None]:
    """Yield `function(item)` in order, with up to `ahead` further calls in `threads` threads.

    The items themselves are read in one thread. An exception of the iterator or the function is
    raised in its place. Closing the returned generator waits for running calls and starts no
    others.

    Args:
        describe: Returns a description of a call, for the timeout error.

    Raises:
        TimeoutError: A call takes longer than `background.TIMEOUT_S`.
    """
    results: deque[tuple[Future[Made], Item]] = deque()
    with closing(prefetch(items)) as source, DaemonPool(threads, "prepare") as pool:
        failure: Exception | None = None
        more = True
        while True:
            while more and len(results) <= ahead:
                try:
                    item = next(source)
                    results.append((pool.submit(function, item), item))
                except StopIteration:
                    more = False
                except Exception as error:  # raised after the results before it
                    more, failure = False, error
            if not results:
                break
            future, item = results.popleft()
            yield result_of(future, describe(item))
        if failure is not None:
            raise failure


class BackgroundWriter(Generic[Item]):
    """Writes items in order in a background thread.

    After the first error nothing more is written, and the next call raises the error. Exiting the
    context writes all queued items, even if the block failed, since they are already computed.

    Args:
        write: Called with one item at a time.
        waiting: Maximum number of queued items; `put` blocks beyond it, which bounds memory.
    """

    def __init__(self, write: Callable[[Item], None], *, waiting: int = 1) -> None:
        self._write = write
        self._items: queue.Queue[tuple[Item] | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write-behind", daemon=True)

    def _work(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._write(*item)
                except BaseException as error:  # raised by the next put() or drain()
                    self._error = error
            self._items.task_done()
        self._items.task_done()

    def put(self, item: Item) -> None:
        """Queue an item; raise the error of an earlier write.

        Raises:
            TimeoutError: An item takes longer than `background.TIMEOUT_S` to write.
        """
        self._raise_error()
        self._put((item,))

    def drain(self) -> None:
        """Wait until everything is written; raise the error of an earlier write."""
        deadline = time.monotonic() + (self._items.maxsize + 1) * background.TIMEOUT_S
        with self._items.all_tasks_done:
            while self._items.unfinished_tasks:
                if not self._items.all_tasks_done.wait(deadline - time.monotonic()):
                    raise background.timeout_error(_WRITING)
        self._raise_error()

    def _put(self, item: tuple[Item] | None) -> None:
        try:
            self._items.put(item, timeout=background.TIMEOUT_S)
        except queue.Full:
            raise background.timeout_error(_WRITING) from None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A timeout of this thread or another: storage may not respond for long.
        if isinstance(error, TimeoutError):
            with contextlib.suppress(queue.Full):
                self._items.put(None, timeout=background.SHUTDOWN_TIMEOUT_S)
            self._thread.join(background.SHUTDOWN_TIMEOUT_S)
            return
        self._put(None)
        self._thread.join((self._items.maxsize + 1) * background.TIMEOUT_S)
        if self._thread.is_alive():
            raise background.timeout_error(_WRITING)
        if error is None:
            self._raise_error()
        elif self._error is not None and error is not self._error:
            error.add_note(f"writing what was computed before failed too: {self._error}")
