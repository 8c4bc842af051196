"""Videos that a metadata.jsonl or metadata.csv lists."""

import shlex
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from stages.clips.csv_rows import CsvRows
from stages.clips.fields import (
    KNOWN_FIELDS,
    caption_from_fields,
    last_frame_from_fields,
    name_of_caption,
    parse_object,
    phrase_from_fields,
    subjects_from_fields,
)
from stages.clips.keys import KeyBook, KeyHashes, has_video_suffix, key_problem
from stages.clips.limits import MAX_MASK_BYTES, read_at_most
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.rows import (
    FieldsOf,
    Place,
    RowSource,
    UnchangedFile,
    check_length,
    line_at,
    lines_of,
)

_Problem = tuple[str, str]
"""What the key of a bad row's record is made from, and why the row is bad."""

_MAX_BLANKS = 64 * 1024
"""Bytes at each end of a file in which its first and last letters are looked for."""


@dataclass(frozen=True, slots=True, eq=False)
class MetadataFile:
    """The clips that a metadata file lists, in order, each under a key of its own.

    Fields: file_name (relative to the folder, inside it), caption (or text, or prompt, in a file
    without captions), subject (words for grounding), and where the subject is on the first frame:
    mask (the file name of a PNG; mask_ids for some of its values), else box_xyxy, else points
    (+ point_labels); or subjects, a list of objects with those fields. last_frame is an object with
    the same fields for the last training frame.

    Every row is parsed once to tell its key; what is kept of it is where it lies. It is parsed
    again when its record is asked for.
    """

    path: Path
    caption_field: str
    """Which field holds the captions."""
    unread_fields: tuple[str, ...]
    """Of any entry, that mean nothing here."""
    _rows: RowSource
    _places: np.ndarray
    """int64 [rows, integers of a place]."""
    _bad: Mapping[int, BadRecord]
    """By row, entries that are no clip or whose key is taken."""

    @classmethod
    def open(cls, path: Path) -> "MetadataFile":
        """Read the file; the videos and masks it names are not touched.

        Raises:
            ValueError: A CSV without a file_name column, or with other delimiters; JSON that is no
                JSON lines; or both text and prompt, and no caption.
        """
        return cls.of_rows(path, CsvRows(path) if path.suffix == ".csv" else _JsonLines(path))

    @classmethod
    def of_rows(cls, path: Path, rows: RowSource) -> "MetadataFile":
        """The same of rows that lie elsewhere.

        Args:
            path: The file that names the videos; their names are relative to its folder.
            rows: A clip each.

        Raises:
            ValueError: What the rows raise; or there are both text and prompt, and no caption.
        """
        integers, hashes = array("q"), array("q")
        problems: dict[int, _Problem] = {}
        names: dict[str, None] = {}
        for row, (place, load) in enumerate(rows.scan()):
            integers.extend(place)
            try:
                fields = load()
                key = _key_of(fields)
            except ValueError as error:
                problems[row] = f"line {place[0]}", str(error)
            else:
                if refusal := key_problem(key):
                    problems[row] = key, refusal
                elif not names.keys() >= fields.keys():
                    names.update(dict.fromkeys(fields))
            hashes.append(KeyHashes.NO_KEY if row in problems else hash(key))
        places = np.frombuffer(integers, np.int64).reshape(-1, rows.place_size)
        keys = KeyHashes(hashes)
        problems |= _second_entries(rows, places, keys.maybe_equal())
        try:
            caption_field = name_of_caption(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        known = {*KNOWN_FIELDS, "file_name", caption_field}
        return cls(
            path=path,
            caption_field=caption_field,
            unread_fields=tuple(name for name in names if name not in known),
            _rows=rows,
            _places=places,
            _bad=_bad_records(problems, places, KeyBook(keys)),
        )

    @property
    def name(self) -> str:
        """The file's, without its folder."""
        return self.path.name

    def __len__(self) -> int:
        return len(self._places)

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """The entries from `start` up to `stop`, with their masks read.

        Raises:
            ValueError: The file has changed since it was opened.
        """
        for row, load in self._loaders(start, stop):
            yield self._bad[row] if row in self._bad else self._record(load())

    def _loaders(self, start: int, stop: int) -> Iterator[tuple[int, FieldsOf]]:
        places = map(tuple, self._places[start:stop].tolist())
        return enumerate(self._rows.read(places), start)

    def _record(self, fields: dict[str, Any]) -> ClipRecord | BadRecord:
        name = _relative_name(fields["file_name"], "file_name")
        key = _key(name)
        try:
            caption = caption_from_fields(fields, self.caption_field)
        except ValueError as error:
            return BadRecord(key=key, reason="bad_record", detail=str(error))
        try:
            prompts = subjects_from_fields(fields, read_mask=self._read_mask)
            last_frame_prompts = last_frame_from_fields(
                fields, first=prompts, read_mask=self._read_mask
            )
            phrase = phrase_from_fields(fields)
        except ValueError as error:
            return BadRecord(key=key, reason="bad_prompt", detail=str(error))
        return ClipRecord(
            key=key,
            video=self.path.parent / name,
            caption=caption,
            prompts=prompts,
            last_frame_prompts=last_frame_prompts,
            phrase=phrase,
        )

    def num_bytes(self, start: int, stop: int) -> int:
        """Size of the videos of the entries from `start` up to `stop`; a missing one counts 0."""
        total = 0
        for row, load in self._loaders(start, stop):
            if row not in self._bad:
                video = self._inside(load()["file_name"], "file_name")
                total += video.stat().st_size if video.is_file() else 0
        return total

    def _read_mask(self, name: object) -> bytes:
        return read_at_most(self._inside(name, "mask"), MAX_MASK_BYTES, f"the mask {name!r}")

    def _inside(self, name: object, field: str) -> Path:
        return self.path.parent / _relative_name(name, field)


class _JsonLines:
    """A JSON object per line; blank lines are left out."""

    place_size = 2  # number of the line, offset in bytes

    def __init__(self, path: Path) -> None:
        self._file = UnchangedFile(path)

    def scan(self) -> Iterator[tuple[Place, FieldsOf]]:
        with self._file.opened() as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            _refuse_list(file, self._file.path)
            for number, (offset, line) in enumerate(lines_of(file), start=1):
                if not line.isspace():
                    yield (number, offset), partial(_json_fields, line)

    def read(self, places: Iterable[Place]) -> Iterator[FieldsOf]:
        with self._file.opened() as file:
            for _, offset in places:
                yield partial(_json_fields, line_at(file, offset))


def _refuse_list(file: BinaryIO, path: Path) -> None:
    """Refuse a file whose first and last letters are brackets; it is left where it stood."""
    start = file.tell()
    is_list = file.read(_MAX_BLANKS).lstrip().startswith(b"[")
    file.seek(max(start, path.stat().st_size - _MAX_BLANKS))
    is_list &= file.read(_MAX_BLANKS).rstrip().endswith(b"]")
    file.seek(start)
    if is_list:
        lines_of = "import json, sys; [print(json.dumps(entry)) for entry in json.load(sys.stdin)]"
        anew = path.with_name(f"{path.stem}-lines.jsonl")
        raise ValueError(
            f"{path} is one JSON list; write a line per clip: "
            f'python -c "{lines_of}" < {shlex.quote(str(path))} > {shlex.quote(str(anew))}'
            f" and set data.path={anew}"
        )


def _json_fields(line: bytes) -> dict[str, Any]:
    check_length(line)
    return parse_object(line)


def _key_of(fields: dict[str, Any]) -> str:
    """A row's key.

    Raises:
        ValueError: The row names no file inside the folder.
    """
    return _key(_relative_name(fields.get("file_name"), "file_name"))


def _second_entries(
    rows: RowSource, places: np.ndarray, candidates: np.ndarray
) -> dict[int, _Problem]:
    """Those of the rows whose key an earlier one has; the rows are read again."""
    book, found = KeyBook(), {}
    loads = rows.read(tuple(places[row].tolist()) for row in candidates)
    for row, load in zip(candidates.tolist(), loads, strict=True):
        key = _key_of(load())
        if refusal := book.claim(key):
            found[row] = key, refusal
    return found


def _bad_records(
    problems: Mapping[int, _Problem], places: np.ndarray, book: KeyBook
) -> dict[int, BadRecord]:
    return {
        row: BadRecord(
            key=book.stand_in(problems[row][0]),
            reason="bad_record",
            detail=f"line {places[row, 0]}: {problems[row][1]}",
        )
        for row in sorted(problems)
    }


def _relative_name(name: object, field: str) -> str:
    """`name` if it stays inside the folder, "./" dropped.

    Raises:
        ValueError: It is missing, no text, absolute, or climbs out.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{field} is missing or no text: {name!r}")
    starts, ends = name[0] not in "/.", name[-1] != "/"
    if starts and ends and "/." not in name and "//" not in name and "\0" not in name:
        return name  # pathlib would say the same, and takes most of a scan's time
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or path.name == "":
        raise ValueError(f"{field} must name a file inside the folder, got {name!r}")
    return str(path)


def _key(name: str) -> str:
    return name.rpartition(".")[0] if has_video_suffix(name) else name
