"""Datasets whose videos are listed in a metadata.jsonl or metadata.csv."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from stages.clips.dataset.csv_rows import CsvRows
from stages.clips.dataset.fields import (
    KNOWN_FIELDS,
    last_frame_from_fields,
    name_of_caption,
    read_at_most,
    subjects_from_fields,
    text_from_fields,
)
from stages.clips.dataset.keys import KeyHashes, KeyRegistry, has_video_suffix, key_problem
from stages.clips.dataset.masks import MAX_MASK_BYTES
from stages.clips.dataset.rows import JsonLines, LoadFields, RowSource
from stages.clips.records import BadRecord, ClipRecord

_Problem = tuple[str, str]
"""Base of the substitute key of a bad row, and the reason why the row is bad."""


@dataclass(frozen=True, slots=True, eq=False)
class MetadataFile:
    """The clips listed in a metadata file, in order and with unique keys.

    Fields: file_name (relative to the folder and inside it), caption (or text, or prompt, in a file
    without captions), subject (phrase for grounding), and the subject on the first frame: mask (the
    file name of a PNG; mask_ids to select some of its values), else box_xyxy, else points
    (+ point_labels); or subjects, a list of objects with these fields. last_frame is an object with
    the same fields for the last training frame.

    Each row is parsed once for its key, of which only its location is kept, and again when its
    record is read.
    """

    path: Path
    caption_field: str
    """Name of the caption field."""
    unread_fields: tuple[str, ...]
    """Names of fields that are ignored."""
    _rows: RowSource
    _locations: np.ndarray
    """int64 [rows, integers per location]."""
    _bad: Mapping[int, BadRecord]
    """Invalid entries and those with a duplicate key, by row."""

    @classmethod
    def open(cls, path: Path) -> "MetadataFile":
        """Read the file, without opening the videos and masks it names.

        Raises:
            ValueError: A CSV without a file_name column or with other delimiters; JSON that is not
                JSON lines; or fields text and prompt, but no caption.
        """
        return cls.of_rows(path, CsvRows(path) if path.suffix == ".csv" else JsonLines(path))

    @classmethod
    def of_rows(cls, path: Path, rows: RowSource) -> "MetadataFile":
        """Read clips from a row source.

        Args:
            path: The file that names the videos, relative to its folder.
            rows: The rows, one per clip.

        Raises:
            ValueError: As `rows.scan`; or there are fields text and prompt, but no caption.
        """
        integers, hashes = array("q"), array("q")
        problems: dict[int, _Problem] = {}
        names: dict[str, None] = {}
        for row, (location, load) in enumerate(rows.scan()):
            integers.extend(location)
            try:
                fields = load()
                key = _key_of(fields)
            except ValueError as error:
                problems[row] = f"line {location[0]}", str(error)
            else:
                if reason := key_problem(key):
                    problems[row] = key, reason
                elif not names.keys() >= fields.keys():
                    names.update(dict.fromkeys(fields))
            hashes.append(KeyHashes.NO_KEY if row in problems else hash(key))
        locations = np.frombuffer(integers, np.int64).reshape(-1, rows.location_size)
        keys = KeyHashes(hashes)
        problems |= _find_duplicates(rows, locations, keys.duplicate_candidates())
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
            _locations=locations,
            _bad=_bad_records(problems, locations, KeyRegistry(keys)),
        )

    @property
    def name(self) -> str:
        """File name without its folder."""
        return self.path.name

    def __len__(self) -> int:
        return len(self._locations)

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """Read the records from `start` up to `stop`, including their masks.

        Raises:
            ValueError: The file has changed since it was opened.
        """
        for row, load in self._loaders(start, stop):
            yield self._bad[row] if row in self._bad else self._record(load())

    def _loaders(self, start: int, stop: int) -> Iterator[tuple[int, LoadFields]]:
        locations = map(tuple, self._locations[start:stop].tolist())
        return enumerate(self._rows.read(locations), start)

    def _record(self, fields: dict[str, Any]) -> ClipRecord | BadRecord:
        name = _relative_name(fields["file_name"], "file_name")
        key = _key(name)
        try:
            caption = text_from_fields(fields, self.caption_field)
        except ValueError as error:
            return BadRecord(key=key, reason="bad_record", detail=str(error))
        try:
            prompts = subjects_from_fields(fields, read_mask=self._read_mask)
            last_frame_prompts = last_frame_from_fields(
                fields, first=prompts, read_mask=self._read_mask
            )
            phrase = text_from_fields(fields, "subject")
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
        """Total size of the videos from `start` up to `stop`; missing ones count 0."""
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


def _key_of(fields: dict[str, Any]) -> str:
    """Key of a row.

    Raises:
        ValueError: The row does not name a file inside the folder.
    """
    return _key(_relative_name(fields.get("file_name"), "file_name"))


def _find_duplicates(
    rows: RowSource, locations: np.ndarray, candidates: np.ndarray
) -> dict[int, _Problem]:
    """Candidates whose key equals that of an earlier row; reads the candidates again."""
    registry, found = KeyRegistry(), {}
    loads = rows.read(tuple(locations[row].tolist()) for row in candidates)
    for row, load in zip(candidates.tolist(), loads, strict=True):
        key = _key_of(load())
        if reason := registry.claim(key):
            found[row] = key, reason
    return found


def _bad_records(
    problems: Mapping[int, _Problem], locations: np.ndarray, registry: KeyRegistry
) -> dict[int, BadRecord]:
    return {
        row: BadRecord(
            key=registry.substitute(problems[row][0]),
            reason="bad_record",
            detail=f"line {locations[row, 0]}: {problems[row][1]}",
        )
        for row in sorted(problems)
    }


def _relative_name(name: object, field: str) -> str:
    """`name` without "./", if it lies inside the folder.

    Raises:
        ValueError: It is missing, not a string, absolute, or outside the folder.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{field} is missing or not a string: {name!r}")
    starts, ends = name[0] not in "/.", name[-1] != "/"
    if starts and ends and "/." not in name and "//" not in name and "\0" not in name:
        return name  # as pathlib would, which would take most of the time of a scan
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or path.name == "":
        raise ValueError(f"{field} must name a file inside the folder, got {name!r}")
    return str(path)


def _key(name: str) -> str:
    return name.rpartition(".")[0] if has_video_suffix(name) else name
