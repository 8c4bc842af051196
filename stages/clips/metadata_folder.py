"""Videos that a metadata.jsonl or metadata.csv lists."""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from stages.clips.csv_rows import Row, read_csv
from stages.clips.fields import (
    KNOWN_FIELDS,
    caption_from_fields,
    last_frame_from_fields,
    name_of_caption,
    parse_object,
    phrase_from_fields,
    subjects_from_fields,
)
from stages.clips.keys import KeyBook, has_video_suffix
from stages.clips.limits import MAX_MASK_BYTES, read_at_most
from stages.clips.records import BadRecord, ClipRecord

_JSON_CELLS = ("mask_ids", "box_xyxy", "points", "point_labels", "subjects", "last_frame")
"""CSV columns whose cells hold JSON."""


FieldsOf = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MetadataFile:
    """The clips that a metadata file lists, in order, each under a key of its own.

    Fields: file_name (relative to the folder, inside it), caption (or text, or prompt, in a file
    without captions), subject (words for grounding), and where the subject is on the first frame:
    mask (the file name of a PNG; mask_ids for some of its values), else box_xyxy, else points
    (+ point_labels); or subjects, a list of objects with those fields. last_frame is an object with
    the same fields for the last training frame.
    """

    path: Path
    caption_field: str
    """Which field holds the captions."""
    unread_fields: tuple[str, ...]
    """Of any entry, that mean nothing here."""
    _entries: tuple[_Entry | BadRecord, ...]

    @classmethod
    def open(cls, path: Path) -> "MetadataFile":
        """Read the file; the videos and masks it names are not touched.

        Raises:
            ValueError: A CSV without a file_name column, or with other delimiters; JSON that is no
                JSON lines; or both text and prompt, and no caption.
        """
        return cls.of_rows(path, (_read_csv if path.suffix == ".csv" else _read_jsonl)(path))

    @classmethod
    def of_rows(cls, path: Path, rows: Iterable[tuple[str, FieldsOf]]) -> "MetadataFile":
        """The same of rows that were read elsewhere.

        Args:
            path: The file that names the videos; their names are relative to its folder.
            rows: Each one's place in the file, and a function that gives its fields or raises
                ValueError.

        Raises:
            ValueError: There are both text and prompt, and no caption.
        """
        book = KeyBook()
        entries = tuple(_entry(where, load, book) for where, load in rows)
        names = {name: 0 for entry in entries if isinstance(entry, _Entry) for name in entry.fields}
        try:
            caption_field = name_of_caption(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        known = {*KNOWN_FIELDS, "file_name", caption_field}
        return cls(path, caption_field, tuple(name for name in names if name not in known), entries)

    @property
    def name(self) -> str:
        """The file's, without its folder."""
        return self.path.name

    def __len__(self) -> int:
        return len(self._entries)

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """The entries from `start` up to `stop`, with their masks read."""
        for entry in self._entries[start:stop]:
            yield entry if isinstance(entry, BadRecord) else self._record(entry)

    def _record(self, entry: _Entry) -> ClipRecord | BadRecord:
        try:
            caption = caption_from_fields(entry.fields, self.caption_field)
        except ValueError as error:
            return BadRecord(key=entry.key, reason="bad_record", detail=str(error))
        try:
            prompts = subjects_from_fields(entry.fields, read_mask=self._read_mask)
            last_frame_prompts = last_frame_from_fields(
                entry.fields, first=prompts, read_mask=self._read_mask
            )
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
        return read_at_most(self._inside(name, "mask"), MAX_MASK_BYTES, f"the mask {name!r}")

    def _inside(self, name: object, field: str) -> Path:
        return self.path.parent / _relative_name(name, field)


def _read_jsonl(path: Path) -> Iterator[tuple[str, FieldsOf]]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"[") and content.rstrip().endswith(b"]"):
        lines_of = "import json, sys; [print(json.dumps(entry)) for entry in json.load(sys.stdin)]"
        anew = path.with_name(f"{path.stem}-lines.jsonl")
        raise ValueError(
            f"{path} is one JSON list; write a line per clip: "
            f'python -c "{lines_of}" < {shlex.quote(str(path))} > {shlex.quote(str(anew))}'
            f" and set data.path={anew}"
        )
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", partial(parse_object, line)


def _read_csv(path: Path) -> Iterator[tuple[str, FieldsOf]]:
    for number, row in read_csv(path)[1]:
        yield f"line {number}", partial(_csv_fields, row)


def _csv_fields(row: Callable[[], Row]) -> dict[str, Any]:
    fields: dict[str, Any] = {**row()}
    for name in _JSON_CELLS:
        if name in fields:
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} must be JSON such as [0, 0, 9, 9]: {error}") from error
    return fields


def _entry(where: str, load: FieldsOf, book: KeyBook) -> _Entry | BadRecord:
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
    return name.rpartition(".")[0] if has_video_suffix(name) else name
