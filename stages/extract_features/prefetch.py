"""Runs an iterator in a thread, a little ahead of whoever consumes it; used by `extract`."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")

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
