"""Files that list one clip per row: gone through once, then read again row by row.

A million rows are not held as objects: a row is remembered by a few integers that say where it
lies, and parsed when its shard is read.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from stages.clips.limits import MAX_JSON_BYTES

FieldsOf = Callable[[], dict[str, Any]]
"""Gives a row's fields, or raises ValueError where the row is malformed."""

Place = tuple[int, ...]
"""Where a row lies: the number of its line, from 1, and what its source needs to find it."""

MAX_LINE_BYTES = MAX_JSON_BYTES
"""Longest line that is read (16 MiB)."""

SPACES = " \t\r\n\v\f"
"""Dropped around the name of a file in a list; any other space may be part of the name."""


class RowSource(Protocol):
    """The rows of a file, or of several that belong together line by line."""

    place_size: int
    """Integers in a place."""

    def scan(self) -> Iterator[tuple[Place, FieldsOf]]:
        """Every row in order, with its place; a row's fields must be asked for before the next.

        Raises:
            ValueError: The file is malformed as a whole.
        """

    def read(self, places: Iterable[Place]) -> Iterator[FieldsOf]:
        """The rows at some places.

        Raises:
            ValueError: The file has changed since it was scanned.
        """


class UnchangedFile:
    """A file that is opened several times and must be the same each time."""

    def __init__(self, path: Path) -> None:
        """Remember what the file is now."""
        self.path = path
        self._identity = _identity(path.stat())

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file.

        Raises:
            ValueError: It has changed, so that places in it mean nothing.
        """
        with self.path.open("rb") as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise ValueError(
                    f"{self.path} was changed while it was in use; run the command again, which "
                    "goes on with the changed file"
                )
            yield file


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line, split at `\\n` alone, the line break included.

    Of a line longer than MAX_LINE_BYTES as many bytes are given, and one more.
    """
    offset = file.tell()
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield offset, line
        offset += len(line)
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
            offset += len(line)
            if not line:
                return


def line_at(file: BinaryIO, offset: int) -> bytes:
    """The line that begins at an offset, as `lines_of` gives it."""
    file.seek(offset)
    return file.readline(MAX_LINE_BYTES + 1)


def check_length(line: bytes) -> None:
    """Refuse a line that was not read to its end.

    Raises:
        ValueError: It is longer than MAX_LINE_BYTES.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has over {MAX_LINE_BYTES:,} bytes")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
