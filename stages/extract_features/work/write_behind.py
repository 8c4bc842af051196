"""Writes in a thread while the next clip is computed; used by `shard_work`."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from stages import background

Item = TypeVar("Item")

_WRITING = "writing a clip into the cache"


class WriteBehind(Generic[Item]):
    """Hands items to `write`, in order, in a thread of its own.

    After the first error nothing more is written, and the error is raised by whatever is called
    next. Leaving the context writes what was put in before, whether or not the block failed: that
    work is done.

    Args:
        write: Called with one item at a time.
        waiting: How many items may wait; `put` blocks beyond that, which bounds the memory held.
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
                except BaseException as error:  # raised again by whoever puts or drains
                    self._error = error
            self._items.task_done()
        self._items.task_done()

    def put(self, item: Item) -> None:
        """Queue an item; raises what writing an earlier one raised.

        Raises:
            TimeoutError: an item takes longer than `background.PATIENCE_S` to write.
        """
        self._raise_error()
        self._put((item,))

    def drain(self) -> None:
        """Return when everything is written; raises what writing raised."""
        deadline = time.monotonic() + (self._items.maxsize + 1) * background.PATIENCE_S
        with self._items.all_tasks_done:
            while self._items.unfinished_tasks:
                if not self._items.all_tasks_done.wait(deadline - time.monotonic()):
                    raise background.stuck(_WRITING)
        self._raise_error()

    def _put(self, item: tuple[Item] | None) -> None:
        try:
            self._items.put(item, timeout=background.PATIENCE_S)
        except queue.Full:
            raise background.stuck(_WRITING) from None

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
        if isinstance(
            error, TimeoutError
        ):  # of this thread or another; no storage answers for long
            with contextlib.suppress(queue.Full):
                self._items.put(None, timeout=background.LAST_WAIT_S)
            self._thread.join(background.LAST_WAIT_S)
            return
        self._put(None)
        self._thread.join((self._items.maxsize + 1) * background.PATIENCE_S)
        if self._thread.is_alive():
            raise background.stuck(_WRITING)
        if error is None:
            self._raise_error()
        elif self._error is not None and error is not self._error:
            error.add_note(f"writing what was computed before failed too: {self._error}")
