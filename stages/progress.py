"""How a stage tells of its progress without knowing a console; `pipeline.console` draws it.

Whoever draws calls `check_stop` each time, so that a request to stop is met wherever work advances.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from stages.processes.stop_request import check_stop


class Task(Protocol):
    """One bar: a known amount of work, advanced as it is done."""

    def advance(self, amount: int = 1) -> None:
        """Move the bar by `amount` units of the task's total."""

    def expect(self, total: int) -> None:
        """Set the total, where more is known of it now than when the bar was opened."""

    def note(self, text: str) -> None:
        """Show a few words beside the bar, such as the current loss."""


class Progress(Protocol):
    """Opens bars and prints lines while they run."""

    def task(
        self, description: str, total: int | None, *, completed: int = 0, unit: str = "it"
    ) -> AbstractContextManager[Task]:
        """Open a bar; `total=None` for work of unknown size, `completed` for work resumed.

        With the unit `bytes`, amounts are shown in kB, MB and so on.
        """

    def log(self, text: str) -> None:
        """Print a line above the bars."""


class _SilentTask:
    def advance(self, amount: int = 1) -> None:
        check_stop()

    def expect(self, total: int) -> None:
        check_stop()

    def note(self, text: str) -> None:
        check_stop()


class SilentProgress:
    """Draws nothing: for tests, and for every rank but the first."""

    @contextmanager
    def task(
        self, description: str, total: int | None, *, completed: int = 0, unit: str = "it"
    ) -> Iterator[Task]:
        """Open a bar nobody sees."""
        check_stop()
        yield _SilentTask()

    def log(self, text: str) -> None:
        """Drop the line."""
        check_stop()
