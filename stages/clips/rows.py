"""Files that list one clip per row: scanned once, then read again row by row.

To save memory with a million rows, only a few integers per row are kept, which locate it in the
file; it is parsed when its shard is read.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from stages.clips.limits import MAX_JSON_BYTES

LoadFields = Callable[[], dict[str, Any]]
"""Returns the fields of a row; ValueError if the row is malformed."""

RowLocation = tuple[int, ...]
"""Location of a row: its line number, from 1, and whatever its source needs to find it."""

MAX_LINE_BYTES = MAX_JSON_BYTES
"""Longest line that is read (16 MiB)."""

SPACES = " \t\r\n\v\f"
"""Stripped from file names in a list; any other space may be part of the name."""


class RowSource(Protocol):
    """The rows of a file, or of several parallel files."""

    location_size: int
    """Number of integers in a location."""

    def scan(self) -> Iterator[tuple[RowLocation, LoadFields]]:
        """Every row in order, with its location; its fields must be loaded before the next row.

        Raises:
            ValueError: The file is malformed as a whole.
        """

    def read(self, locations: Iterable[RowLocation]) -> Iterator[LoadFields]:
        """The rows at the given locations.

        Raises:
            ValueError: The file has changed since it was scanned.
        """


class UnchangedFile:
    """A file that is opened several times and must not change in between."""

    def __init__(self, path: Path) -> None:
        """Record the current identity of the file."""
        self.path = path
        self._identity = _identity(path.stat())

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file for reading.

        Raises:
            ValueError: The file has changed, so that row locations are invalid.
        """
        with self.path.open("rb") as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise ValueError(
                    f"{self.path} was changed while it was in use; run the command again to "
                    "continue with the changed file"
                )
            yield file


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line, split only at `\\n` and including the line break.

    Lines longer than MAX_LINE_BYTES are truncated to MAX_LINE_BYTES + 1 bytes.
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
    """The line that starts at an offset, as returned by `lines_of`."""
    file.seek(offset)
    return file.readline(MAX_LINE_BYTES + 1)


def check_length(line: bytes) -> None:
    """Reject a line that was truncated.

    Raises:
        ValueError: It is longer than MAX_LINE_BYTES.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has over {MAX_LINE_BYTES:,} bytes")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
