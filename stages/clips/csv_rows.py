"""The records of a CSV file, each read by itself: one that is malformed spoils no other."""

import csv
import io
import re
import shlex
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from cache_schema.checksummed_json import parse_json
from stages.clips.keys import has_video_suffix
from stages.clips.rows import MAX_LINE_BYTES, SPACES, FieldsOf, Place, UnchangedFile

_CELL = r'[ ]*+(?:"(?:[^"]|"")*+"|[^",\r\n]*+)'
_RECORD = re.compile(rf"{_CELL}(?:,{_CELL})*+[\r\n]*+")
"""RFC 4180: a cell with a quote in it stands in quotes."""

_JSON_CELLS = ("mask_ids", "box_xyxy", "points", "point_labels", "subjects", "last_frame")
"""Columns whose cells hold JSON."""

Row = dict[str, Any]
"""Cells, as text, by column, without those that are empty."""


class CsvRows:
    """The records of a CSV file.

    As RFC 4180 has it: columns separated by commas, line breaks and commas inside quotes. Spaces
    after a comma and around a column's name are dropped.

    A record is malformed (its function raises ValueError) when a quote in it is never closed, when
    it runs on into a line that is a record of its own, or when it has more cells than there are
    columns. Reading goes on at the line after its first one.
    """

    place_size = 3  # number of the first line, offset and length in bytes

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: It has no column file_name, or names a column twice.
        """
        self._file = UnchangedFile(path)
        with self._file.opened() as file:
            try:
                header: list[str] = next(_reader(_Lines(file).from_first()), [])
            except csv.Error as error:
                raise ValueError(f"{path}: the header cannot be read: {error}") from error
        self.columns = tuple(name.strip() for name in header)
        _check_columns(self.columns, path)

    def scan(self) -> Iterator[tuple[Place, FieldsOf]]:
        """Every record that is not blank."""
        with self._file.opened() as file:
            for place, row in _records(_Lines(file), self.columns):
                yield place, partial(_fields, row)

    def read(self, places: Iterable[Place]) -> Iterator[FieldsOf]:
        """Records that are not malformed; of others, some cells."""
        with self._file.opened() as file:
            for _, offset, length in places:
                file.seek(offset)
                yield partial(self._parsed, file.read(length))

    def _parsed(self, record: bytes) -> dict[str, Any]:
        text = record.decode("utf-8", "surrogateescape")
        return _fields(_row(next(_reader(io.StringIO(text, newline=""))), self.columns))


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
    """The lines of a CSV file that were read and belong to no finished record yet."""

    def __init__(self, file: BinaryIO) -> None:
        # Bytes that are not UTF-8 survive as surrogates, so that only their own record is bad.
        self.offset = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        """Of the first, in bytes."""
        self.number = 1
        """Of the first."""
        file.seek(self.offset)
        self._text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        self._held: deque[str] = deque()

    def from_first(self) -> Iterator[str]:
        """The lines from the first on; one that is over MAX_LINE_BYTES comes in pieces."""
        yield from tuple(self._held)
        while line := self._text.readline(MAX_LINE_BYTES):
            self._held.append(line)
            yield line

    def is_at_end(self) -> bool:
        """Whether there is no line."""
        return not self._held and next(self.from_first(), None) is None

    def first(self, count: int) -> list[str]:
        """The first lines, of those that were read."""
        return list(islice(self._held, count))

    def drop(self, count: int) -> int:
        """Go on after the first lines; returns how many bytes they have."""
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
                anew = path.with_name(f"{path.stem}-commas.csv")
                raise ValueError(
                    f"the columns of {path} are separated by {name}, not by commas. Write it anew: "
                    f'python -c "{script}" < {shlex.quote(str(path))} > {shlex.quote(str(anew))}'
                    f" and set data.path={anew}"
                )
        raise ValueError(
            f"{path} has no column file_name; its header is {list(columns)}. Rename the column "
            "that names the videos"
        )
    twice = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has the column {twice[0]} twice; which one is meant is not clear")


def _records(lines: _Lines, columns: Sequence[str]) -> Iterator[tuple[Place, Callable[[], Row]]]:
    """Each record's place and cells; starts after the header."""
    header = _reader(lines.from_first())
    next(header)
    lines.drop(header.line_num)
    while not lines.is_at_end():
        reader = _reader(lines.from_first())
        taken = 0
        try:
            for cells in reader:
                record = lines.first(reader.line_num - taken)
                if cells:
                    _check_lines(record, lines.number, columns)
                place = lines.number, lines.offset
                size = lines.drop(len(record))
                taken = reader.line_num
                if cells:
                    yield (*place, size), _row(cells, columns)
        except (csv.Error, ValueError) as error:
            place = lines.number, lines.offset
            yield (*place, lines.drop(1)), _malformed(str(error))


def _reader(lines: Iterable[str]) -> Any:
    return csv.reader(lines, strict=True, skipinitialspace=True)


def _check_lines(lines: Sequence[str], number: int, columns: Sequence[str]) -> None:
    """Refuse quotes inside cells without quotes, and a record that took in another one.

    A quote that was left open can meet the opening quote of a later record.

    Args:
        lines: Of the record.
        number: Of the first one.
        columns: Of the file.
    """
    text = "".join(lines)
    if '"' not in text:
        return
    if not _RECORD.fullmatch(text):
        raise ValueError("a quote stands inside a cell that is not in quotes")
    for after, line in enumerate(lines[1:], start=1):
        if not _RECORD.fullmatch(line):
            continue
        cells: list[str] = next(_reader([line]), [])
        place = columns.index("file_name")
        is_whole = place < len(cells) <= len(columns) and len(cells) >= min(2, len(columns))
        if is_whole and has_video_suffix(cells[place].strip(SPACES)):
            raise ValueError(
                f"a quote that is opened here takes in line {number + after}, which is a record of "
                "its own"
            )


def _row(cells: Sequence[str], columns: Sequence[str]) -> Callable[[], Row]:
    def row() -> Row:
        if len(cells) > len(columns):
            raise ValueError(
                f"the record has {len(cells)} cells, the header {len(columns)}; a cell with a "
                "comma stands in quotes"
            )
        # Programs leave out empty cells at the end.
        named = {name: cell for name, cell in zip(columns, cells, strict=False) if name and cell}
        named["file_name"] = named.get("file_name", "").strip(SPACES)
        if len(cells) < len(columns) and not has_video_suffix(named["file_name"]):
            raise ValueError(
                f"the record has {len(cells)} cells, the header {len(columns)}; a cell with a "
                "line break stands in quotes"
            )
        return named

    return row


def _malformed(problem: str) -> Callable[[], Row]:
    def row() -> Row:
        raise ValueError(f"{problem}; is a quote left open, or not written twice inside quotes?")

    return row
