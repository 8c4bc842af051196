"""The records of a CSV file, each read by itself: one that is malformed spoils no other."""

import csv
import io
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.clips.keys import has_video_suffix

_CELL = r'[ ]*+(?:"(?:[^"]|"")*+"|[^",\r\n]*+)'
_RECORD = re.compile(rf"{_CELL}(?:,{_CELL})*+[\r\n]*+")
"""RFC 4180: a cell with a quote in it stands in quotes."""

Row = dict[str, str]
"""Cells by column, without those that are empty."""


def read_csv(path: Path) -> tuple[tuple[str, ...], Iterator[tuple[int, Callable[[], Row]]]]:
    """The columns, and each record's first line with a function that gives its cells.

    As RFC 4180 has it: columns separated by commas, line breaks and commas inside quotes. Spaces
    after a comma and around a column's name are dropped.

    A record is malformed (its function raises ValueError) when a quote in it is never closed, when
    it runs on into a line that is a record of its own, or when it has more cells than there are
    columns. Reading goes on at the line after its first one.

    Raises:
        ValueError: The header has no column file_name, or names a column twice.
    """
    # Bytes that are not UTF-8 survive as surrogates, so that only their own record is bad.
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    header: list[str] = []
    try:
        header = next(_reader(lines, 0), [])
    except csv.Error as error:
        raise ValueError(f"{path}: the header cannot be read: {error}") from error
    columns = tuple(name.strip() for name in header)
    _check_columns(columns, path)
    return columns, _records(lines, columns)


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


def _records(
    lines: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[int, Callable[[], Row]]]:
    """Each record's line number, from 1, and cells; starts after the header."""
    header = _reader(lines, 0)
    next(header)
    start = header.line_num
    while start < len(lines):
        reader = _reader(lines, start)
        origin = start
        try:
            for cells in reader:
                stop = origin + reader.line_num
                if cells:
                    _check_lines(lines, start, stop, columns)
                    yield start + 1, _row(cells, columns)
                start = stop
        except (csv.Error, ValueError) as error:
            yield start + 1, _malformed(str(error))
            start += 1


def _reader(lines: Sequence[str], start: int) -> Any:
    after = (lines[number] for number in range(start, len(lines)))
    return csv.reader(after, strict=True, skipinitialspace=True)


def _check_lines(lines: Sequence[str], start: int, stop: int, columns: Sequence[str]) -> None:
    """Refuse quotes inside cells without quotes, and a record that took in another one.

    A quote that was left open can meet the opening quote of a later record.
    """
    if not _RECORD.fullmatch("".join(lines[start:stop])):
        raise ValueError("a quote stands inside a cell that is not in quotes")
    for number in range(start + 1, stop):
        if not _RECORD.fullmatch(lines[number]):
            continue
        cells: list[str] = next(_reader(lines[number : number + 1], 0), [])
        place = columns.index("file_name")
        is_whole = place < len(cells) <= len(columns) and len(cells) >= min(2, len(columns))
        if is_whole and has_video_suffix(cells[place].strip()):
            raise ValueError(
                f"a quote that is opened here takes in line {number + 1}, which is a record of its "
                "own"
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
        named = {**named, "file_name": named.get("file_name", "").strip()}
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
