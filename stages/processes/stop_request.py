"""Ctrl-C and SIGTERM: the first asks the process to stop, a second one ends it at once.

Outside `deferred` blocks the request raises KeyboardInterrupt. Python drops an exception that is
raised in a `__del__` or a callback, and libraries catch what they should not: the request is
remembered, raised again, and raised by whatever calls `check_stop`.

The signals' numbers also go through a pipe to a thread, which counts them whatever the main thread
is doing; it ends the process even where that waits in a library for ever.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

REPEATS_WITHIN_S = 1.0
"""Signals that follow the first one this soon are the same request: launchers pass on what the
terminal or the scheduler has sent already."""

ENDED_BY_SIGNAL = 130
"""Exit code of a process that a second signal ended."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RAISE_AGAIN, _LEAVE = 0, 255
"""Bytes in the pipe that are no signal's number."""
_PAUSE_BEFORE_RAISING_AGAIN_S = 0.005
_SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.made = False
        """Whether it was, until `fulfil`."""
        self.told = ""
        """What is printed when the first signal comes."""
        self._noted = False
        self._deferred = 0
        self._raised = False
        self.times_raised = 0

    @contextmanager
    def deferred(self, told: str) -> Iterator[None]:
        """Let the first signal raise nothing in the block, which looks at `made` itself.

        Args:
            told: what is printed when it comes, such as "stopping after this step".
        """
        self._deferred += 1
        before, self.told = self.told, told
        try:
            yield
        finally:
            self._deferred -= 1
            self.told = before

    def fulfil(self) -> None:
        """Nothing more is raised for the first signal; a second one still ends the process."""
        self.made = False

    def note(self) -> None:
        """A signal has come; only the first one is a request."""
        if not self._noted:
            self._noted = self.made = True

    def check(self) -> None:
        """Raise KeyboardInterrupt where a request was made; in the main thread alone.

        Not while a KeyboardInterrupt is on its way up already.
        """
        if (
            self.made
            and not self._deferred
            and threading.current_thread() is threading.main_thread()
            and not isinstance(sys.exc_info()[1], KeyboardInterrupt)
        ):
            self._raised = True
            self.times_raised += 1
            raise KeyboardInterrupt

    def handle(self) -> None:
        """Take a signal in the main thread, between two of its instructions.

        Raises:
            KeyboardInterrupt: once, unless deferred.
        """
        self.note()
        if self.made and not self._raised and not self._deferred:
            self._raised = True
            self.times_raised += 1
            raise KeyboardInterrupt

    def raise_again(self) -> None:
        """Let the next signal raise as the first did: what that raised was dropped."""
        self._raised = False


class _Watch:
    """The handlers, the pipe and the thread behind a `StopRequest`."""

    def __init__(self) -> None:
        self.request = StopRequest()
        self._first_at: float | None = None
        self._own = 0
        self._dropped = 0
        self._from_pipe, self._into_pipe = os.pipe()
        os.set_blocking(self._into_pipe, False)
        self._thread = threading.Thread(target=self._count, name="signals", daemon=True)
        self._hook = sys.unraisablehook

    def start(self) -> None:
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._into_pipe, warn_on_full_buffer=False)
        sys.unraisablehook = self._on_dropped_exception
        self._handlers = [signal.signal(number, self._handle) for number in _SIGNALS]

    def stop(self) -> None:
        with self.request.deferred(""):  # for what the thread is about to send
            os.write(self._into_pipe, bytes([_LEAVE]))
            self._thread.join()
        for number, handler in zip(_SIGNALS, self._handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        os.close(self._from_pipe)
        os.close(self._into_pipe)

    def leave_to_parent(self) -> None:
        """In a fork: SIGTERM ends it, Ctrl-C is the parent's business."""
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is self._on_dropped_exception.__code__:
            os.write(self._into_pipe, bytes([_RAISE_AGAIN]))  # what is raised here is dropped too
        else:
            self.request.handle()

    def _on_dropped_exception(self, dropped: Any) -> None:
        if self.request.made and isinstance(dropped.exc_value, KeyboardInterrupt):
            self._dropped = self.request.times_raised
            os.write(self._into_pipe, bytes([_RAISE_AGAIN]))
        else:
            self._hook(dropped)

    def _count(self) -> None:
        while (number := os.read(self._from_pipe, 1)[0]) != _LEAVE:
            if number == _RAISE_AGAIN:
                time.sleep(_PAUSE_BEFORE_RAISING_AGAIN_S)
                if self.request.times_raised != self._dropped:
                    continue  # `check_stop` was faster
                self._own += 1
                self.request.raise_again()
                signal.pthread_kill(_main_thread(), signal.SIGINT)
            elif number == signal.SIGINT and self._own:
                self._own -= 1
            elif number in _SIGNALS:
                self._take_signal()

    def _take_signal(self) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self.request.note()
            if self.request.told and os.environ.get("RANK", "0") == "0":
                _tell(f"{self.request.told}; a second signal ends the process at once")
        elif now - self._first_at >= REPEATS_WITHIN_S:
            _tell("ended at once by a second signal")
            os._exit(ENDED_BY_SIGNAL)


def _tell(text: str) -> None:
    """Write a line past all locks, which the main thread may hold."""
    before = b"\r" + _SHOW_CURSOR if os.isatty(2) else b""
    os.write(2, before + text.encode() + b"\n")


_watch: _Watch | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take Ctrl-C and SIGTERM as requests for the length of the block.

    Within such a block, the same request is used again. Outside the main thread, which alone may
    say what signals do, nothing changes.
    """
    global _watch
    if _watch is not None:
        yield _watch.request
        return
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    _watch = _Watch()
    _watch.start()
    try:
        yield _watch.request
    finally:
        watch, _watch = _watch, None
        watch.stop()


def check_stop() -> None:
    """Raise KeyboardInterrupt where this process was asked to stop and still works."""
    if _watch is not None:
        _watch.request.check()


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None, "the main thread runs"
    return ident


_masks = threading.local()


def _before_fork() -> None:
    """A signal that comes before a child has left the watch would count as the parent's."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    global _watch
    if _watch is not None:
        watch, _watch = _watch, None
        watch.leave_to_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
