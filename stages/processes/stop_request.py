"""Handling of Ctrl-C and SIGTERM: the first signal requests a stop, a second one exits at once.

Outside `deferred` blocks the request raises KeyboardInterrupt. Python drops exceptions raised in a
`__del__` or a callback, and libraries catch too much; so the request is remembered, raised again,
and also raised by `check_stop`.

A wakeup pipe also passes the signal numbers to a thread, which counts them independently of the
main thread. It ends the process even if the main thread is blocked in a library.
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
"""Signals within this time of the first one count as the same request: launchers forward signals
that the terminal or the scheduler has already sent to every process."""

ENDED_BY_SIGNAL = 130
"""Exit code of a process ended by a second signal."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RAISE_AGAIN, _EXIT_THREAD = 0, 255
"""Bytes in the pipe that are not signal numbers."""
_RAISE_AGAIN_DELAY_S = 0.005
_SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """Whether this process has received a stop request."""

    def __init__(self) -> None:
        self.requested = False
        """True from the first signal until `mark_handled`."""
        self.message = ""
        """Printed when the first signal arrives."""
        self._signalled = False
        self._deferred = 0
        self._raised = False
        self.times_raised = 0

    @contextmanager
    def deferred(self, message: str) -> Iterator[None]:
        """Do not raise on the first signal within the block, which must check `made` itself.

        Args:
            message: printed when the signal arrives, such as "stopping after this step".
        """
        self._deferred += 1
        before, self.message = self.message, message
        try:
            yield
        finally:
            self._deferred -= 1
            self.message = before

    def mark_handled(self) -> None:
        """Mark the request as handled; a second signal still ends the process."""
        self.requested = False

    def note(self) -> None:
        """Record a signal; only the first one is a request."""
        if not self._signalled:
            self._signalled = self.requested = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop was requested; only in the main thread.

        Does nothing while another KeyboardInterrupt is being handled.
        """
        if (
            self.requested
            and not self._deferred
            and threading.current_thread() is threading.main_thread()
            and not isinstance(sys.exc_info()[1], KeyboardInterrupt)
        ):
            self._raised = True
            self.times_raised += 1
            raise KeyboardInterrupt

    def handle(self) -> None:
        """Handle a signal; runs in the main thread, as Python's signal handlers do.

        Raises:
            KeyboardInterrupt: once, unless deferred.
        """
        self.note()
        if self.requested and not self._raised and not self._deferred:
            self._raised = True
            self.times_raised += 1
            raise KeyboardInterrupt

    def raise_again(self) -> None:
        """Let the next signal raise like the first one, whose exception was dropped."""
        self._raised = False


class _SignalWatcher:
    """Signal handlers, pipe and thread that maintain a `StopRequest`."""

    def __init__(self) -> None:
        self.request = StopRequest()
        self._first_signal_at: float | None = None
        self._self_sent = 0
        self._raises_when_dropped = 0
        self._pipe_read_fd, self._pipe_write_fd = os.pipe()
        os.set_blocking(self._pipe_write_fd, False)
        self._thread = threading.Thread(target=self._read_pipe, name="signals", daemon=True)
        self._previous_hook = sys.unraisablehook

    def start(self) -> None:
        self._thread.start()
        self._previous_wakeup_fd = signal.set_wakeup_fd(
            self._pipe_write_fd, warn_on_full_buffer=False
        )
        sys.unraisablehook = self._on_dropped_exception
        self._previous_handlers = [signal.signal(number, self._handle) for number in _SIGNALS]

    def stop(self) -> None:
        with self.request.deferred(""):  # the thread may still send a signal
            os.write(self._pipe_write_fd, bytes([_EXIT_THREAD]))
            self._thread.join()
        for number, handler in zip(_SIGNALS, self._previous_handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        sys.unraisablehook = self._previous_hook
        os.close(self._pipe_read_fd)
        os.close(self._pipe_write_fd)

    def leave_to_parent(self) -> None:
        """In a forked child: SIGTERM ends it, and Ctrl-C is left to the parent."""
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._previous_hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is self._on_dropped_exception.__code__:
            # An exception raised here would be dropped too.
            os.write(self._pipe_write_fd, bytes([_RAISE_AGAIN]))
        else:
            self.request.handle()

    def _on_dropped_exception(self, dropped: Any) -> None:
        if self.request.requested and isinstance(dropped.exc_value, KeyboardInterrupt):
            self._raises_when_dropped = self.request.times_raised
            os.write(self._pipe_write_fd, bytes([_RAISE_AGAIN]))
        else:
            self._previous_hook(dropped)

    def _read_pipe(self) -> None:
        while (number := os.read(self._pipe_read_fd, 1)[0]) != _EXIT_THREAD:
            if number == _RAISE_AGAIN:
                time.sleep(_RAISE_AGAIN_DELAY_S)
                if self.request.times_raised != self._raises_when_dropped:
                    continue  # `check_stop` has raised meanwhile
                self._self_sent += 1
                self.request.raise_again()
                signal.pthread_kill(_main_thread(), signal.SIGINT)
            elif number == signal.SIGINT and self._self_sent:
                self._self_sent -= 1
            elif number in _SIGNALS:
                self._on_signal()

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._first_signal_at is None:
            self._first_signal_at = now
            self.request.note()
            if self.request.message and os.environ.get("RANK", "0") == "0":
                _write_line(f"{self.request.message}; a second signal ends the process at once")
        elif now - self._first_signal_at >= REPEATS_WITHIN_S:
            _write_line("ended at once by a second signal")
            os._exit(ENDED_BY_SIGNAL)


def _write_line(text: str) -> None:
    """Write a line with os.write: the main thread may hold the locks of sys.stderr."""
    prefix = b"\r" + _SHOW_CURSOR if os.isatty(2) else b""
    os.write(2, prefix + text.encode() + b"\n")


_watcher: _SignalWatcher | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Treat Ctrl-C and SIGTERM as stop requests within the block.

    Nested blocks share one request. Outside the main thread, where Python does not allow signal
    handlers to be set, signals are left as they are.
    """
    global _watcher
    if _watcher is not None:
        yield _watcher.request
        return
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    _watcher = _SignalWatcher()
    _watcher.start()
    try:
        yield _watcher.request
    finally:
        watcher, _watcher = _watcher, None
        watcher.stop()


def check_stop() -> None:
    """Raise KeyboardInterrupt if a stop was requested and is not deferred or fulfilled."""
    if _watcher is not None:
        _watcher.request.check()


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None, "the main thread is running"
    return ident


_saved = threading.local()


def _before_fork() -> None:
    """Block signals: one that reaches a child too early would count as the parent's."""
    _saved.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _saved.mask)


def _after_fork_in_child() -> None:
    global _watcher
    if _watcher is not None:
        watcher, _watcher = _watcher, None
        watcher.leave_to_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, _saved.mask)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
