"""Console output: progress bars and lines on stderr, one table or JSON object on stdout.

Implements `stages.progress.Progress` with rich. Text from the user's files is never parsed as rich
markup, and its control characters are escaped (`plain`).
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
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
class CommandResult:
    """Result of a command: rows and notes for people, data for scripts."""

    title: str
    rows: list[tuple[str, str]]
    data: dict[str, Any]
    """JSON values printed by `--json`."""
    notes: list[str] = field(default_factory=list)
    """Lines under the table, such as the paths of written files."""
    exit_code: int = 0
    text: str | None = None
    """Printed verbatim instead of title, rows and notes: CSV."""


def json_values(summary: Any, *, leave_out: Sequence[str] = (), **renamed: str) -> dict[str, Any]:
    """Return the fields and properties of a dataclass as JSON values, for `CommandResult.data`.

    Keys are the names without a leading `num_`.

    Args:
        summary: An instance of a dataclass; dataclasses inside it are converted likewise, or by
            their own `as_dict`.
        leave_out: Fields and properties to omit.
        renamed: Key in the result -> field or property, where the names differ.
    """
    computed = [name for name, value in vars(type(summary)).items() if isinstance(value, property)]
    names = [*(one.name for one in fields(summary)), *computed]
    keys = {name: name.removeprefix("num_") for name in names}
    keys |= {name: key for key, name in renamed.items()}
    return {
        key: _json_value(getattr(summary, name))
        for name, key in keys.items()
        if name not in leave_out
    }


def _json_value(value: Any) -> Any:
    from cache_schema import SkippedClip  # here: it loads numpy, which --help does not need

    if isinstance(value, SkippedClip):
        return {"key": value.key, "reason": value.reason, "detail": value.detail}
    if is_dataclass(value):
        return value.as_dict() if hasattr(value, "as_dict") else json_values(value)
    if isinstance(value, Mapping):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def plain(text: str) -> Text:
    """Make any text safe to print: no markup, control characters or credentials."""
    return Text(visible(without_credentials(text)))


def write_result(result: CommandResult, *, as_json: bool) -> None:
    """Print the result to stdout, on rank 0 only."""
    if rank() != 0:
        return
    if as_json:
        print_json(result.data)
        return
    if result.text is not None:
        print_file(result.text)
        return
    console = Console()
    if console.width < _MIN_TABLE_WIDTH or not result.rows:
        lines = [result.title, *(f"{name}: {value}" for name, value in result.rows)]
        console.print(plain("\n".join(lines)), soft_wrap=True)
    else:
        table = Table(title=plain(result.title), show_header=False, title_justify="left")
        # Fold instead of truncating: an ellipsis would lose part of a name, and is not ASCII.
        table.add_column(style="bold", overflow="fold")
        table.add_column(overflow="fold")
        for name, value in result.rows:
            table.add_row(plain(name), plain(value))
        console.print(table)
    for note in result.notes:
        console.print(plain(note), soft_wrap=True)


_MIN_TABLE_WIDTH = 40
"""Terminal columns; narrower terminals get one line per row."""


def print_json(data: Any) -> None:
    """Print one JSON object to stdout, as ASCII if stdout cannot encode a character."""
    text = visible_json(json.dumps(redacted(data), ensure_ascii=False))
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(redacted(data))
    print(text)


def print_file(text: str) -> None:
    """Print text meant to be saved as a file, as UTF-8 in every locale."""
    text = without_credentials(text)
    if sys.stdout.isatty():
        text = visible(text)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    print(text, end="")


def escape_unencodable_output() -> None:
    """Make stdout and stderr escape characters they cannot encode, and undecodable file names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_traceback


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print_error("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def print_error(text: str) -> None:
    """Print a message to stderr."""
    Console(stderr=True).print(plain(text), soft_wrap=True)


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Show progress bars on stderr while the block runs, on rank 0 only."""
    if rank() != 0:
        yield SilentProgress()
        return
    with _Bars() as bars:
        yield bars


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, also for C libraries and child processes."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        saved_stdout = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(saved_stdout, 1)
            os.close(saved_stdout)


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit when it is slow."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        unit = task.fields["unit"]
        if unit == "bytes":
            return Text(f"{format_bytes(speed)}/s")
        singular = unit.removesuffix("s")
        return Text(f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{singular}")


class _Count(ProgressColumn):
    """Completed and total units."""

    def render(self, task: RichTask) -> Text:
        is_bytes = task.fields["unit"] == "bytes"
        shown: Callable[[float], str] = format_bytes if is_bytes else lambda number: f"{number:.0f}"
        total = "" if task.total is None else f"/{shown(task.total)}"
        unit = "" if is_bytes else f" {task.fields['unit']}"
        return Text(f"{shown(task.completed)}{total}{unit}")


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
        if self._shown:  # stopping bars that were never started would print an empty line
            self._bars.stop()

    @contextmanager
    def task(
        self, description: str, total: int | None, *, completed: int = 0, unit: str = "it"
    ) -> Iterator[Task]:
        """Open a bar; when the block ends it stops and stays visible."""
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


_LINE_INTERVAL_S = 30.0
"""Interval of the progress lines printed when stderr is not a terminal."""


class _Bar:
    def __init__(self, bars: RichBars, bar: TaskID) -> None:
        self._bars = bars
        self._bar = bar
        self._printed_at = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._bar, amount)
        now = time.monotonic()
        if not self._bars.console.is_terminal and now - self._printed_at >= _LINE_INTERVAL_S:
            self._printed_at = now
            (task,) = (task for task in self._bars.tasks if task.id == self._bar)
            parts = (task.description, _Count().render(task), _Rate().render(task))
            self._bars.console.print(Text(" ".join(map(str, parts))), soft_wrap=True)
        check_stop()

    def expect(self, total: int) -> None:
        self._bars.update(self._bar, total=total)
        check_stop()

    def note(self, text: str) -> None:
        self._bars.update(self._bar, note=str(plain(text)))
        check_stop()


def format_flop(number: float) -> str:
    """Format a number of operations: 842 TFLOP."""
    for unit in ("MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        number /= 1000 if unit != "MFLOP" else 1e6
        if number < 1000:
            break
    return f"{number:.3g} {unit}"


def format_bytes(number: float) -> str:
    """Format a number of bytes: 67.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def format_time(seconds: float) -> str:
    """Format a duration: 4.2 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
