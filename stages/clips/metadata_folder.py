"""A folder of videos listed in metadata.jsonl or metadata.csv."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from stages.clips.fields import (
    caption_from_fields,
    last_frame_from_fields,
    parse_object,
    phrase_from_fields,
    subjects_from_fields,
)
from stages.clips.keys import VIDEO_SUFFIXES, KeyBook
from stages.clips.limits import MAX_MASK_BYTES
from stages.clips.records import BadRecord, ClipRecord

_JSON_CELLS = ("box_xyxy", "points", "point_labels", "subjects", "last_frame")
"""CSV columns whose cells hold JSON."""


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MetadataFile:
    """The entries of one metadata file, in order, each under a key of its own.

    Fields: file_name (relative to the folder, inside it), caption, subject (words for grounding),
    and where the subject is on the first frame: mask (the file name of a PNG), else box_xyxy, else
    points (+ point_labels); or subjects, a list of objects with those fields. last_frame is an
    object with the same fields for the last training frame. Unknown fields are ignored.
    """

    path: Path
    _entries: tuple[_Entry | BadRecord, ...]

    @classmethod
    def open(cls, path: Path) -> "MetadataFile":
        """Read the file; the videos and masks it names are not touched.

        Raises:
            ValueError: A CSV without a file_name column.
        """
        read = _read_jsonl if path.suffix == ".jsonl" else _read_csv
        book = KeyBook()
        return cls(path, tuple(_entry(where, load, book) for where, load in read(path)))

    def __len__(self) -> int:
        return len(self._entries)

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """The entries from `start` up to `stop`, with their masks read."""
        for entry in self._entries[start:stop]:
            yield entry if isinstance(entry, BadRecord) else self._record(entry)

    def _record(self, entry: _Entry) -> ClipRecord | BadRecord:
        try:
            caption = caption_from_fields(entry.fields)
        except ValueError as error:
            return BadRecord(key=entry.key, reason="bad_record", detail=str(error))
        try:
            prompts = subjects_from_fields(entry.fields, read_mask=self._read_mask)
            last_frame_prompts = last_frame_from_fields(entry.fields, read_mask=self._read_mask)
            phrase = phrase_from_fields(entry.fields)
        except ValueError as error:
            return BadRecord(key=entry.key, reason="bad_prompt", detail=str(error))
        return ClipRecord(
            key=entry.key,
            video=self._inside(entry.fields["file_name"], "file_name"),
            caption=caption,
            prompts=prompts,
            last_frame_prompts=last_frame_prompts,
            phrase=phrase,
        )

    def num_bytes(self, start: int, stop: int) -> int:
        """Size of the videos of the entries from `start` up to `stop`; a missing one counts 0."""
        total = 0
        for entry in self._entries[start:stop]:
            if isinstance(entry, _Entry):
                video = self._inside(entry.fields["file_name"], "file_name")
                total += video.stat().st_size if video.is_file() else 0
        return total

    def _read_mask(self, name: object) -> bytes:
        path = self._inside(name, "mask")
        try:
            # A pipe or a device would be read for ever.
            if path.exists() and not path.is_file():
                raise ValueError(f"the mask {name!r} is no file")
            if path.stat().st_size > MAX_MASK_BYTES:
                raise ValueError(f"the mask {name!r} is over {MAX_MASK_BYTES:,} bytes")
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"the mask {name!r} cannot be read: {error.strerror}") from error

    def _inside(self, name: object, field: str) -> Path:
        return self.path.parent / _relative_name(name, field)


_Loader = Callable[[], dict[str, Any]]


def _read_jsonl(path: Path) -> Iterator[tuple[str, _Loader]]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", partial(parse_object, line)


def _read_csv(path: Path) -> Iterator[tuple[str, _Loader]]:
    # Bytes that are not UTF-8 survive as surrogates, so that only their own row is bad.
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if "file_name" not in (rows.fieldnames or ()):
        raise ValueError(f"{path} has no column file_name; its header is {rows.fieldnames}")
    for row in rows:
        yield f"line {rows.line_num}", partial(_csv_fields, row)


def _csv_fields(row: dict[str | None, Any]) -> dict[str, Any]:
    if None in row:
        raise ValueError("the row has more cells than the header")
    fields = {name: cell for name, cell in row.items() if name is not None and cell}
    for name in _JSON_CELLS:
        if name in fields:
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} must be JSON such as [0, 0, 9, 9]: {error}") from error
    return fields


def _entry(where: str, load: _Loader, book: KeyBook) -> _Entry | BadRecord:
    key = where
    try:
        fields = load()
        name = _relative_name(fields.get("file_name"), "file_name")
        key = _key(name)
    except ValueError as error:
        return BadRecord(key=book.stand_in(where), reason="bad_record", detail=f"{where}: {error}")
    if refusal := book.claim(key):
        return BadRecord(key=book.stand_in(key), reason="bad_record", detail=f"{where}: {refusal}")
    return _Entry(key, fields)


def _relative_name(name: object, field: str) -> str:
    """`name` if it stays inside the folder, "./" dropped.

    Raises:
        ValueError: It is missing, no text, absolute, or climbs out.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{field} is missing or no text: {name!r}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or path.name == "":
        raise ValueError(f"{field} must name a file inside the folder, got {name!r}")
    return str(path)


def _key(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and suffix.lower() in VIDEO_SUFFIXES else name
