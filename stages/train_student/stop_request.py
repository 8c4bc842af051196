"""Ctrl-C and SIGTERM while training: the step is finished and kept before the process ends.

Schedulers send SIGTERM some time before they take the machine away. The training loop looks at the
request once a step, together with all ranks.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SECONDS_OF_ONE_CTRL_C = 1.0
"""Launchers pass on what the terminal has sent already."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.made = False
        self._at = 0.0
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; a second Ctrl-C stops at once.

        Raises:
            KeyboardInterrupt: on the second Ctrl-C.
        """
        if os.getpid() != self._process:  # a loader's process, made by fork
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if self.made and number == signal.SIGINT and now - self._at > _SECONDS_OF_ONE_CTRL_C:
            raise KeyboardInterrupt
        if not self.made:
            self.made, self._at = True, now


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take Ctrl-C and SIGTERM as requests for the length of the block."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may say what signals do
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, request.handle) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
