"""Files of one JSON object a line, each with its `step`: the form of what a run writes down."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_schema.durable import write_whole


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole line; empty where there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    return [_parsed(line, path) for line in _whole_lines(path)]


class RowFile:
    """Appends rows while a run goes on."""

    def __init__(self, path: Path, steps_done: int) -> None:
        """Open the file, dropping what an interrupted run wrote after `steps_done` steps."""
        kept = [line for line in _whole_lines(path) if _parsed(line, path)["step"] <= steps_done]
        text = "".join(f"{line}\n" for line in kept)
        write_whole(path, text.encode(), temporary=path.with_name(f".{path.name}.partial"))
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats are written as their shortest exact decimals."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the rows so far survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        int(row["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has a damaged line: {line[:80]!r}") from error
    return dict(row)
