"""Protocol by which stages report progress; `pipeline.console` implements it for a terminal.

Every implementation calls `check_stop` in each method, so that a stop request takes effect wherever
work advances.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from stages.processes.stop_request import check_stop


class Task(Protocol):
    """One progress bar."""

    def advance(self, amount: int = 1) -> None:
        """Advance the bar by `amount` units."""

    def expect(self, total: int) -> None:
        """Set the total, if it was unknown or has changed since the bar was opened."""

    def note(self, text: str) -> None:
        """Show a short text beside the bar, such as the current loss."""


class Progress(Protocol):
    """Opens progress bars and prints log lines above them."""

    def task(
        self, description: str, total: int | None, *, completed: int = 0, unit: str = "it"
    ) -> AbstractContextManager[Task]:
        """Open a bar.

        Args:
            description: label of the bar.
            total: amount of work; None if it is unknown.
            completed: amount already done, when work is resumed.
            unit: unit of the amounts; `bytes` is shown in kB, MB and so on.
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
    """Displays nothing; for tests and for every rank except rank 0."""

    @contextmanager
    def task(
        self, description: str, total: int | None, *, completed: int = 0, unit: str = "it"
    ) -> Iterator[Task]:
        """Open a bar that is not displayed."""
        check_stop()
        yield _SilentTask()

    def log(self, text: str) -> None:
        """Discard the line."""
        check_stop()
