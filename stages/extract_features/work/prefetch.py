"""Reads and decodes in threads, a little ahead of whoever consumes it; used by `shard_work`."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

_POLL_S = 0.1


def prefetch(items: Iterable[Item], *, ahead: int = 1) -> Generator[Item, None, None]:
    """Yield the items in order while the next `ahead` of them are made in a thread.

    An exception of the iterator is raised at its place. Closing the returned generator stops the
    thread after the item it is making.
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
            tag, value = slots.get()
            if tag == "end":
                return
            if tag == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()


def prefetch_map(
    function: Callable[[Item], Made], items: Iterable[Item], *, ahead: int, threads: int
) -> Generator[Made, None, None]:
    """Yield `function(item)` in order, the next `ahead` of them under way in `threads` threads.

    The items themselves are made in one thread, one after the other. An exception, of the iterator
    or of the function, is raised at its place. Closing the returned generator waits for the calls
    under way and makes no others.
    """
    results: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    with closing(prefetch(items)) as source:
        failure: Exception | None = None
        more = True
        try:
            while True:
                while more and len(results) <= ahead:
                    try:
                        results.append(pool.submit(function, next(source)))
                    except StopIteration:
                        more = False
                    except Exception as error:  # raised after what came before it
                        more, failure = False, error
                if not results:
                    break
                yield results.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if failure is not None:
            raise failure
