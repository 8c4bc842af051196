"""Files that list one clip per row: scanned once, then read again row by row.

To save memory with a million rows, only a few integers per row are kept, which locate it in the
file; it is parsed when its shard is read.
"""

import os
import shlex
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cache_schema.shown_text import first_few
from stages.clips.dataset.fields import MAX_JSON_BYTES, parse_object

CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_LISTS = ("videos.txt", "video.txt")

_MAX_BLANK_BYTES = 64 * 1024
"""Bytes at each end of a file searched for its first and last non-blank character."""

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


def _lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
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


def _line_at(file: BinaryIO, offset: int) -> bytes:
    """The line that starts at an offset, as returned by `_lines_of`."""
    file.seek(offset)
    return file.readline(MAX_LINE_BYTES + 1)


def _check_length(line: bytes) -> None:
    """Reject a line that was truncated.

    Raises:
        ValueError: It is longer than MAX_LINE_BYTES.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has over {MAX_LINE_BYTES:,} bytes")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def conversion_command(script: str, path: Path, output: Path) -> str:
    """Command that writes a file anew with a Python script, and the setting to change."""
    return (
        f'python -c "{script}" < {shlex.quote(str(path))} > {shlex.quote(str(output))}'
        f" and set data.path={output}"
    )


class JsonLines:
    """A JSON object per line; blank lines are skipped."""

    location_size = 2  # line number, offset in bytes

    def __init__(self, path: Path) -> None:
        self._file = UnchangedFile(path)

    def scan(self) -> Iterator[tuple[RowLocation, LoadFields]]:
        """All lines that are not blank."""
        with self._file.opened() as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            _reject_json_list(file, self._file.path)
            for number, (offset, line) in enumerate(_lines_of(file), start=1):
                if not line.isspace():
                    yield (number, offset), partial(_parse_line, line)

    def read(self, locations: Iterable[RowLocation]) -> Iterator[LoadFields]:
        """The lines at the given locations."""
        with self._file.opened() as file:
            for _, offset in locations:
                yield partial(_parse_line, _line_at(file, offset))


def _reject_json_list(file: BinaryIO, path: Path) -> None:
    """Reject a file that starts and ends with brackets; keeps the file position."""
    start = file.tell()
    is_list = file.read(_MAX_BLANK_BYTES).lstrip().startswith(b"[")
    file.seek(max(start, path.stat().st_size - _MAX_BLANK_BYTES))
    is_list &= file.read(_MAX_BLANK_BYTES).rstrip().endswith(b"]")
    file.seek(start)
    if is_list:
        script = "import json, sys; [print(json.dumps(entry)) for entry in json.load(sys.stdin)]"
        command = conversion_command(script, path, path.with_name(f"{path.stem}-lines.jsonl"))
        raise ValueError(f"{path} is one JSON list; write a line per clip: {command}")


def _parse_line(line: bytes) -> dict[str, Any]:
    _check_length(line)
    return parse_object(line)


class PairedLines:
    """Pairs line N of one file with line N of the other, ignoring blank lines at the end.

    `prompts.txt` and `videos.txt` are also read by the trainers of CogVideo and finetrainers.
    """

    location_size = 3  # line number, and the line's offset in each file

    def __init__(self, captions: Path, videos: Path) -> None:
        """Take a file with a caption per line, and one with a video, relative to its folder."""
        self._files = UnchangedFile(captions), UnchangedFile(videos)

    def scan(self) -> Iterator[tuple[RowLocation, LoadFields]]:
        """All pairs of lines.

        Raises:
            ValueError: The numbers of lines differ, or a line is blank, so that captions cannot be
                matched to videos reliably.
        """
        captions, videos = (file.path for file in self._files)
        with self._files[0].opened() as texts, self._files[1].opened() as names:
            found = _WithoutTrailingBlanks(texts), _WithoutTrailingBlanks(names)
            for number, (text, name) in enumerate(zip_longest(*found), start=1):
                if text is not None and name is not None:
                    yield (number, text[0], name[0]), partial(_parse_pair, text[1], name[1])
        if found[0].count != found[1].count:
            raise ValueError(
                f"{captions} has {found[0].count} lines and {videos} has {found[1].count}; line N "
                "of one belongs to line N of the other, so the numbers of lines must be equal"
            )
        for path, lines in ((captions, found[0]), (videos, found[1])):
            if blank := lines.blank:
                raise ValueError(
                    f"{path} has blank lines ({first_few(list(map(str, blank)), 5)}), which some "
                    "programs count and others skip; remove clips without caption from both files"
                )

    def read(self, locations: Iterable[RowLocation]) -> Iterator[LoadFields]:
        """The pairs at the given locations."""
        with self._files[0].opened() as texts, self._files[1].opened() as names:
            for _, text_offset, name_offset in locations:
                yield partial(
                    _parse_pair, _line_at(texts, text_offset), _line_at(names, name_offset)
                )


class _WithoutTrailingBlanks:
    """Iterates over offset and bytes of a file's lines, up to the last that is not blank."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0
        """Number of lines so far."""
        self.blank: list[int] = []
        """Line numbers of blank lines."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        pending_blanks: list[tuple[int, bytes]] = []
        for line in _lines_of(self._file):
            if _is_blank(line[1]):
                pending_blanks.append(line)
                continue
            if pending_blanks:
                first = self.count + 1
                self.blank += range(first, first + len(pending_blanks))
                self.count += len(pending_blanks)
                yield from pending_blanks
                pending_blanks.clear()
            self.count += 1
            yield line


def _text(line: bytes) -> str:
    """Decode a line, without its line break; a byte that is not UTF-8 only affects this line."""
    text = line.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")


def _is_blank(line: bytes) -> bool:
    return not line[:1].isalnum() and not _text(line).strip()


def _parse_pair(text: bytes, name: bytes) -> dict[str, Any]:
    _check_length(text)
    _check_length(name)
    return {"file_name": _text(name).strip(SPACES), "caption": _text(text)}
