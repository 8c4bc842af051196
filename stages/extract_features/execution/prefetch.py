"""Iterators that are read and mapped in threads, ahead of their consumer."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from typing import TypeVar

from stages.processes import background
from stages.processes.background import DaemonPool, result_of

Item = TypeVar("Item")
Made = TypeVar("Made")

_POLL_S = 0.1


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
