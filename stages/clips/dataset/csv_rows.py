"""Reading of CSV files in which a malformed record does not affect the others."""

import csv
import io
import re
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from cache_schema.checksummed_json import parse_json
from stages.clips.dataset.keys import has_video_suffix
from stages.clips.dataset.rows import (
    MAX_LINE_BYTES,
    SPACES,
    LoadFields,
    RowLocation,
    UnchangedFile,
    conversion_command,
)

_CELL = r'[ ]*+(?:"(?:[^"]|"")*+"|[^",\r\n]*+)'
_RECORD = re.compile(rf"{_CELL}(?:,{_CELL})*+[\r\n]*+")
"""RFC 4180: a cell that contains a quote must be quoted."""

_JSON_CELLS = ("mask_ids", "box_xyxy", "points", "point_labels", "subjects", "last_frame")
"""Columns whose cells contain JSON."""

Row = dict[str, Any]
"""Non-empty cells, as text, by column."""


class CsvRows:
    """The records of a CSV file.

    The format is RFC 4180: comma-separated columns, with line breaks and commas only inside quotes.
    Spaces after a comma and around column names are dropped.

    A record is malformed (its function raises ValueError) if a quote in it is never closed, if it
    spans a line that is a record of its own, or if it has more cells than there are columns.
    Reading continues at the line after its first one.
    """

    location_size = 3  # number of the first line, offset and length in bytes

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: There is no column file_name, or a column occurs twice.
        """
        self._file = UnchangedFile(path)
        with self._file.opened() as file:
            try:
                header: list[str] = next(_csv_reader(_Lines(file).from_first()), [])
            except csv.Error as error:
                raise ValueError(f"{path}: the header cannot be read: {error}") from error
        self.columns = tuple(name.strip() for name in header)
        _check_columns(self.columns, path)

    def scan(self) -> Iterator[tuple[RowLocation, LoadFields]]:
        """All records that are not blank."""
        with self._file.opened() as file:
            for location, row in _records(_Lines(file), self.columns):
                yield location, partial(_fields, row)

    def read(self, locations: Iterable[RowLocation]) -> Iterator[LoadFields]:
        """Records that are not malformed; malformed ones are read without checks."""
        with self._file.opened() as file:
            for _, offset, length in locations:
                file.seek(offset)
                yield partial(self._parsed, file.read(length))

    def _parsed(self, record: bytes) -> dict[str, Any]:
        text = record.decode("utf-8", "surrogateescape")
        return _fields(_row(next(_csv_reader(io.StringIO(text, newline=""))), self.columns))


def _fields(row: Callable[[], Row]) -> dict[str, Any]:
    fields = row()
    for name in _JSON_CELLS:
        if name in fields:
            try:
                fields[name] = parse_json(fields[name])
            except ValueError as error:
                raise ValueError(f"{name} must be JSON such as [0, 0, 9, 9]: {error}") from error
    return fields


class _Lines:
    """Buffer of the lines of a CSV file that are read but not yet part of a finished record."""

    def __init__(self, file: BinaryIO) -> None:
        # Bytes that are not UTF-8 become surrogates, so that only their own record is bad.
        self.offset = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        """Offset of the first buffered line, in bytes."""
        self.number = 1
        """Number of the first buffered line."""
        file.seek(self.offset)
        self._text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        self._held: deque[str] = deque()

    def from_first(self) -> Iterator[str]:
        """The buffered lines, then further ones; lines over MAX_LINE_BYTES are split."""
        yield from tuple(self._held)
        while line := self._text.readline(MAX_LINE_BYTES):
            self._held.append(line)
            yield line

    def is_at_end(self) -> bool:
        """Whether no line is left."""
        return not self._held and next(self.from_first(), None) is None

    def first(self, count: int) -> list[str]:
        """The first `count` buffered lines."""
        return list(islice(self._held, count))

    def drop(self, count: int) -> int:
        """Drop the first `count` buffered lines; returns their size in bytes."""
        size = 0
        for _ in range(min(count, len(self._held))):
            line = self._held.popleft()
            size += len(line if line.isascii() else line.encode("utf-8", "surrogateescape"))
        self.offset += size
        self.number += count
        return size


def _check_columns(columns: Sequence[str], path: Path) -> None:
    if "file_name" not in columns:
        for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
            split = [cell.strip(' "') for cell in delimiter.join(columns).split(delimiter)]
            if "file_name" in split:
                written = {";": "';'", "\t": r"'\t'"}[delimiter]
                script = (
                    "import csv, sys; csv.writer(sys.stdout).writerows("
                    f"csv.reader(sys.stdin, delimiter={written}))"
                )
                output = path.with_name(f"{path.stem}-commas.csv")
                raise ValueError(
                    f"the columns of {path} are separated by {name}, not by commas. Convert it: "
                    f"{conversion_command(script, path, output)}"
                )
        raise ValueError(
            f"{path} has no column file_name; its header is {list(columns)}. Rename the column "
            "with the video file names to file_name"
        )
    twice = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has the column {twice[0]} twice; remove or rename one of them")


def _records(
    lines: _Lines, columns: Sequence[str]
) -> Iterator[tuple[RowLocation, Callable[[], Row]]]:
    """Location and cells of each record after the header."""
    header = _csv_reader(lines.from_first())
    next(header)
    lines.drop(header.line_num)
    while not lines.is_at_end():
        reader = _csv_reader(lines.from_first())
        consumed = 0
        try:
            for cells in reader:
                record = lines.first(reader.line_num - consumed)
                if cells:
                    _check_quotes(record, lines.number, columns)
                location = lines.number, lines.offset
                size = lines.drop(len(record))
                consumed = reader.line_num
                if cells:
                    yield (*location, size), _row(cells, columns)
        except (csv.Error, ValueError) as error:
            location = lines.number, lines.offset
            yield (*location, lines.drop(1)), _malformed(str(error))


def _csv_reader(lines: Iterable[str]) -> Any:
    return csv.reader(lines, strict=True, skipinitialspace=True)


def _check_quotes(lines: Sequence[str], number: int, columns: Sequence[str]) -> None:
    """Reject quotes inside unquoted cells, and a record that spans another one.

    An unclosed quote can be closed by the opening quote of a later record.

    Args:
        lines: Lines of the record.
        number: Line number of the first one.
        columns: Columns of the file.
    """
    text = "".join(lines)
    if '"' not in text:
        return
    if not _RECORD.fullmatch(text):
        raise ValueError("a quote inside an unquoted cell")
    for after, line in enumerate(lines[1:], start=1):
        if not _RECORD.fullmatch(line):
            continue
        cells: list[str] = next(_csv_reader([line]), [])
        index = columns.index("file_name")
        is_whole = index < len(cells) <= len(columns) and len(cells) >= min(2, len(columns))
        if is_whole and has_video_suffix(cells[index].strip(SPACES)):
            raise ValueError(
                f"an unclosed quote spans line {number + after}, which is a record of its own"
            )


def _row(cells: Sequence[str], columns: Sequence[str]) -> Callable[[], Row]:
    def row() -> Row:
        if len(cells) > len(columns):
            raise ValueError(
                f"the record has {len(cells)} cells, the header {len(columns)}; a cell with a "
                "comma must be quoted"
            )
        # Some programs omit empty cells at the end of a record.
        named = {name: cell for name, cell in zip(columns, cells, strict=False) if name and cell}
        named["file_name"] = named.get("file_name", "").strip(SPACES)
        if len(cells) < len(columns) and not has_video_suffix(named["file_name"]):
            raise ValueError(
                f"the record has {len(cells)} cells, the header {len(columns)}; a cell with a "
                "line break must be quoted"
            )
        return named

    return row


def _malformed(problem: str) -> Callable[[], Row]:
    def row() -> Row:
        raise ValueError(f"{problem}; close every quote, and double quotes inside quoted cells")

    return row
