"""What people see: bars and lines on stderr, one table or one JSON object on stdout.

Implements `stages.progress.Progress` with rich; every command reports through it. Text that comes
from the user's files is never read as rich's markup, and nothing in it is obeyed by the terminal
(`plain`).
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from cache_schema.shown_text import redacted, visible, visible_json, without_credentials
from pipeline.environment import rank
from stages.processes.stop_request import check_stop
from stages.progress import Progress, SilentProgress, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a command found out, for people (rows, last lines) and for scripts (data)."""

    title: str
    rows: list[tuple[str, str]]
    data: dict[str, Any]
    """JSON values; what `--json` prints."""
    notes: list[str] = field(default_factory=list)
    """Lines under the table, such as the paths of what was made."""
    exit_code: int = 0
    text: str | None = None
    """Printed as it is in place of title, rows and notes: CSV."""


def plain(text: str) -> Text:
    """Text of any origin as it is printed: no markup, no controls, no credentials."""
    return Text(visible(without_credentials(text)))


def present(answer: Answer, *, as_json: bool) -> None:
    """Print the answer to stdout; only the first of several processes does."""
    if rank() != 0:
        return
    if as_json:
        print_json(answer.data)
        return
    if answer.text is not None:
        print_file(answer.text)
        return
    console = Console()
    if console.width < _NARROWEST_TABLE or not answer.rows:
        lines = [answer.title, *(f"{name}: {value}" for name, value in answer.rows)]
        console.print(plain("\n".join(lines)), soft_wrap=True)
    else:
        table = Table(title=plain(answer.title), show_header=False, title_justify="left")
        # Folded, never cut: an ellipsis would lose part of a name, and is no ASCII.
        table.add_column(style="bold", overflow="fold")
        table.add_column(overflow="fold")
        for name, value in answer.rows:
            table.add_row(plain(name), plain(value))
        console.print(table)
    for note in answer.notes:
        console.print(plain(note), soft_wrap=True)


_NARROWEST_TABLE = 40
"""Columns of the terminal; a narrower one gets a line per row."""


def print_json(data: Any) -> None:
    """Print one JSON object to stdout, in ASCII where stdout's encoding lacks a character."""
    text = visible_json(json.dumps(redacted(data), ensure_ascii=False))
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(redacted(data))
    print(text)


def print_file(text: str) -> None:
    """Print what is going to be kept in a file: as UTF-8 in any locale, for it is read as that."""
    text = without_credentials(text)
    if sys.stdout.isatty():
        text = visible(text)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    print(text, end="")


def write_any_text() -> None:
    """Have stdout and stderr escape what their encoding lacks, and file names that are no text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_traceback


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    complain("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def complain(text: str) -> None:
    """Print a line for people to stderr."""
    Console(stderr=True).print(plain(text), soft_wrap=True)


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Show bars on stderr while the block runs; nothing on any process but the first."""
    if rank() != 0:
        yield SilentProgress()
        return
    with _Bars() as bars:
        yield bars


@contextmanager
def stdout_for_the_answer() -> Iterator[None]:
    """Send whatever libraries print to stderr, child processes included."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit when it is slow."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        unit = task.fields["unit"]
        if unit == "bytes":
            return Text(f"{in_bytes(speed)}/s")
        one = unit.removesuffix("s")
        return Text(f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{one}")


class _Count(ProgressColumn):
    """Done of total, with the unit."""

    def render(self, task: RichTask) -> Text:
        in_bytes_too = task.fields["unit"] == "bytes"
        write: Callable[[float], str] = in_bytes if in_bytes_too else lambda number: f"{number:.0f}"
        total = "" if task.total is None else f"/{write(task.total)}"
        unit = "" if in_bytes_too else f" {task.fields['unit']}"
        return Text(f"{write(task.completed)}{total}{unit}")


class _Bars:
    """`Progress` drawn by rich."""

    def __init__(self) -> None:
        self._bars = RichBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Count(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self._shown = False

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown:  # else there is nothing to end, and rich would print an empty line
            self._bars.stop()

    @contextmanager
    def task(
        self, description: str, total: int | None, *, completed: int = 0, unit: str = "it"
    ) -> Iterator[Task]:
        """Open a bar; it stays, stopped, when the block ends."""
        check_stop()
        if not self._shown:
            self._bars.start()
            self._shown = True
        description = str(plain(description))
        bar = self._bars.add_task(description, total=total, completed=completed, unit=unit, note="")
        try:
            yield _Bar(self._bars, bar)
        finally:
            self._bars.stop_task(bar)

    def log(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(plain(text), soft_wrap=True)
        check_stop()


_SECONDS_BETWEEN_LINES = 30.0
"""How often a bar says where it is when stderr is a file, which shows no moving bar."""


class _Bar:
    def __init__(self, bars: RichBars, bar: TaskID) -> None:
        self._bars = bars
        self._bar = bar
        self._said_at = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._bar, amount)
        now = time.monotonic()
        if not self._bars.console.is_terminal and now - self._said_at >= _SECONDS_BETWEEN_LINES:
            self._said_at = now
            (task,) = (task for task in self._bars.tasks if task.id == self._bar)
            words = (task.description, _Count().render(task), _Rate().render(task))
            self._bars.console.print(Text(" ".join(map(str, words))), soft_wrap=True)
        check_stop()

    def expect(self, total: int) -> None:
        self._bars.update(self._bar, total=total)
        check_stop()

    def note(self, text: str) -> None:
        self._bars.update(self._bar, note=str(plain(text)))
        check_stop()


def in_flop(number: float) -> str:
    """Write a number of operations for people: 842 TFLOP."""
    for unit in ("MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        number /= 1000 if unit != "MFLOP" else 1e6
        if number < 1000:
            break
    return f"{number:.3g} {unit}"


def in_bytes(number: float) -> str:
    """Write a number of bytes for people: 67.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def in_time(seconds: float) -> str:
    """Write a duration for people: 4.2 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
