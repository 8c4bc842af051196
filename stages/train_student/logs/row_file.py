"""Files of one JSON object a line, each with its `step`: the form of what a run writes down."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from cache_schema.durable import naming, write_whole

Row = TypeVar("Row")

_MAX_LINE_BYTES = 64 << 20
"""Of a skipped step's line, which names every clip of every rank."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole line; empty where there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    return list(each_row(path))


def each_of(path: Path, kind: type[Row]) -> Iterator[Row]:
    """The same as the dataclass that the lines were written from.

    Raises:
        ValueError: a line is damaged, or has other fields than the dataclass.
    """
    adapter = TypeAdapter(kind)
    for line in _whole_lines(path):
        _parsed(line, path)
        try:
            yield adapter.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            is_there = "" if first["type"] == "missing" else f" is {first['input']!r:.80}"
            raise ValueError(
                f"{path} has a damaged line: {name}{is_there} ({first['msg']})"
            ) from error


def each_row(path: Path) -> Iterator[dict[str, Any]]:
    """The same, a line at a time: a long run's file is larger than memory should be."""
    return (_parsed(line, path) for line in _whole_lines(path))


def count_rows(path: Path) -> int:
    """How many whole lines there are; 0 where there is no file."""
    return sum(1 for _ in _whole_lines(path))


class RowFile:
    """Appends rows while a run goes on."""

    def __init__(self, path: Path, steps_done: int, check: Callable[[], None]) -> None:
        """Open the file, dropping what an interrupted run wrote after `steps_done` steps.

        Args:
            check: called before the file is changed; raises if it may be another process's.

        Raises:
            ValueError: a line is damaged, or its step comes after a later one.
        """
        self._check = check
        if not path.is_file():
            check()
            write_whole(path, b"", temporary=path.with_name(f".{path.name}.partial"))
        kept_bytes = _bytes_until(path, steps_done)
        if kept_bytes < path.stat().st_size:
            check()
            os.truncate(path, kept_bytes)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats are written as their shortest exact decimals."""
        self._check()
        with naming(self._path):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make the rows so far survive a power failure."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _bytes_until(path: Path, steps_done: int) -> int:
    """Where the lines of later steps begin: they follow those of earlier ones."""
    kept_bytes, last = 0, None
    for line in _whole_lines(path):
        step = _parsed(line, path)["step"]
        if last is not None and step < last:
            raise ValueError(
                f"{path} has a line of step {step} after one of step {last}: two runs wrote it; "
                "restore it, or choose another train.run_dir"
            )
        last = step
        kept_bytes += len(line) if step <= steps_done else 0
    return kept_bytes


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends; the last one is left out where it is not whole."""
    if path.is_file():
        with path.open("rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
                yield line
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(f"{path} has a line of more than {_MAX_LINE_BYTES:,} bytes")


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        # Several times as fast as json.loads.
        row: dict[str, Any] = from_json(line, allow_inf_nan=False)
        if type(row["step"]) is not int or not 0 <= row["step"] < 2**63:
            raise ValueError(f"step is {row['step']!r:.80}, no number of steps")
    except (ValueError, TypeError, KeyError) as error:
        start = line[:80].decode("utf-8", "backslashreplace").rstrip("\n")
        raise ValueError(f"{path} has a damaged line: {start!r} ({error})") from error
    return row
