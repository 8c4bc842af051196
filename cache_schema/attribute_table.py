"""Some attributes of all clips in packed columns, for lists, filters and searches.

They are derived from the commit records and stored in `attributes.npz`, so that a list of a million
clips need not parse a million entries. Training never reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema.checksummed_json import JSON
from cache_schema.index import ClipIndex
from cache_schema.index_columns import DamagedIndex, read_archive
from cache_schema.names import ATTRIBUTES_FILE, MAX_INDEX_BYTES
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.records import CommitRecord
from cache_schema.schema import StoreSettings
from cache_schema.storage import UNREADABLE, LocalStorage, Storage

NUMBERS = ("quality", "num_frames", "valid_frames", "lost_at", "prompt.confidence")
"""Attributes with a column of numbers; a dot goes into an object."""

TEXTS = ("prompt.source", "prompt.kinds", "caption")
"""Attributes with a column of texts; a list of texts is joined by `+`."""

_MAX_EXACT = 2**53
"""The largest integer up to which float64 holds each one."""

SHARD_COLUMNS = {
    "shards.name.text": "u1",
    "shards.name.ends": "<u8",
    "shards.crc32c": "<u4",
    "shards.end": "<u8",
}
"""Data types of the columns of shards."""

COLUMNS = (
    SHARD_COLUMNS
    | {f"numbers.{name}": "<f8" for name in NUMBERS}
    | {
        f"texts.{name}.{column}": dtype
        for name in TEXTS
        for column, dtype in {"row": "<i4", "text": "u1", "ends": "<u8"}.items()
    }
)
"""Data types of all columns.

Per shard, in ascending order of names: its name, the `crc32c` of its commit record, and the row
after its last clip. Per clip, shard by shard in the order of the records: numbers, NaN for none;
and the row of its text among the different texts, -1 for none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextColumn:
    """Texts of clips, each different one stored once."""

    rows: np.ndarray
    """int32, per clip the row in `texts`; -1 for none."""
    texts: PackedText

    def of(self, clip: int) -> str | None:
        """The text of a clip."""
        row = int(self.rows[clip])
        return None if row < 0 else self.texts[row]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ListedAttributes:
    """Attributes of a reader's clips, in the order of its `keys`."""

    numbers: Mapping[str, np.ndarray]
    """float64 [clips], by the names in `NUMBERS`; NaN for none."""
    texts: Mapping[str, TextColumn]
    """By the names in `TEXTS`."""
    missing: tuple[str, ...]
    """Shards whose clips have no values here, because the file lacks their current record."""
    problem: str
    """Why the file could not be used at all; empty if it was, or if there is none."""


class AttributeTable:
    """The columns of `attributes.npz`."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        """Take the columns listed in `COLUMNS`; raises `ValueError` if they are inconsistent."""
        self.columns = columns
        self.shards = SortedText(columns["shards.name.text"], columns["shards.name.ends"])
        self.crc32cs = columns["shards.crc32c"]
        self.ends = columns["shards.end"].astype(np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])[: len(self.ends)]
        rows = int(self.ends[-1]) if len(self.ends) else 0
        if not len(self.shards) == len(self.crc32cs) == len(self.ends):
            raise ValueError("its columns of shards differ in length")
        if (self.ends < self.starts).any():
            raise ValueError("its shards overlap")
        self.numbers = {name: columns[f"numbers.{name}"] for name in NUMBERS}
        self.texts = {
            name: TextColumn(
                rows=columns[f"texts.{name}.row"],
                texts=PackedText(columns[f"texts.{name}.text"], columns[f"texts.{name}.ends"]),
            )
            for name in TEXTS
        }
        per_clip = [*self.numbers.values(), *(text.rows for text in self.texts.values())]
        if any(len(column) != rows for column in per_clip):
            raise ValueError(f"a column does not have {rows} rows")
        for text in self.texts.values():
            if len(text.rows) and not -1 <= text.rows.min() <= text.rows.max() < len(text.texts):
                raise ValueError("a clip has a text that is not listed")
            for piece in text.texts.pieces():
                for one in piece:
                    one.decode("utf-8")

    def rows_of(self, shard: str, crc32c: int) -> range | None:
        """Rows of a shard's clips; None if the shard is missing, or has another record."""
        row = self.shards.find(shard)
        if row is None or int(self.crc32cs[row]) != crc32c:
            return None
        return range(int(self.starts[row]), int(self.ends[row]))

    def agrees_with(self, record: CommitRecord, crc32c: int) -> bool:
        """Whether the shard has the values of this record, or is not listed with it."""
        rows = self.rows_of(record.shard, crc32c)
        if rows is None:
            return True
        if len(rows) != len(record.clips):
            return False
        attributes = [clip.attributes for clip in record.clips]
        return all(
            np.array_equal(
                column[rows.start : rows.stop],
                [number_of(value_of(one, name)) for one in attributes],
                equal_nan=True,
            )
            for name, column in self.numbers.items()
        ) and all(
            [text.of(row) for row in rows] == [text_of(value_of(one, name)) for one in attributes]
            for name, text in self.texts.items()
        )

    def in_order_of(self, index: ClipIndex) -> ListedAttributes:
        """The attributes of the index's clips; a shard counts only with the record indexed."""
        num_clips = np.bincount(index.columns["clips.shard"], minlength=len(index.shard_names))
        places = self.shards.rows_of(index.shard_names)
        found = places >= 0
        found[found] = (self.crc32cs[places[found]] == index.columns["shards.crc32c"][found]) & (
            (self.ends - self.starts)[places[found]] == num_clips[found]
        )
        # From the row of the shard's first clip in the index's shards to the one here.
        shift = np.zeros(len(num_clips), np.int64)
        shift[found] = self.starts[places[found]] - (np.cumsum(num_clips) - num_clips)[found]
        by_record = np.where(
            np.repeat(found, num_clips), np.arange(len(index)) + np.repeat(shift, num_clips), -1
        )
        rows = np.empty(len(index), np.int64)
        rows[index.rows_by_record()] = by_record
        known = rows >= 0

        def taken(column: np.ndarray, absent: float) -> np.ndarray:
            values = np.full(len(index), absent, column.dtype)
            values[known] = column[rows[known]]
            return values

        return ListedAttributes(
            numbers={name: taken(column, np.nan) for name, column in self.numbers.items()},
            texts={
                name: TextColumn(rows=taken(text.rows, -1), texts=text.texts)
                for name, text in self.texts.items()
            },
            missing=tuple(index.shard_names[int(row)] for row in np.flatnonzero(~found)),
            problem="",
        )


def read_attributes(storage: Storage, settings: StoreSettings) -> AttributeTable:
    """Read `attributes.npz`, treating it as untrusted input.

    Raises `DamagedIndex`, or `FileNotFoundError` if there is none.
    """
    local = storage.folder / ATTRIBUTES_FILE if isinstance(storage, LocalStorage) else None
    try:
        return parse_attributes(local or storage.read(ATTRIBUTES_FILE, MAX_INDEX_BYTES), settings)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise DamagedIndex(f"it cannot be read ({error.strerror})") from error


def parse_attributes(source: bytes | Path, settings: StoreSettings) -> AttributeTable:
    """Parse a table, treating it as untrusted input; raises `DamagedIndex`."""
    columns = read_archive(source, COLUMNS, settings)
    try:
        return AttributeTable(columns)
    except ValueError as error:
        raise DamagedIndex(f"it is inconsistent ({error})") from error


def listed_attributes(
    storage: Storage, settings: StoreSettings, index: ClipIndex
) -> ListedAttributes:
    """The attributes of the index's clips, as far as `attributes.npz` holds them.

    Raises `StoreUnreachable` if a network storage did not respond.
    """
    problem = ""
    try:
        return read_attributes(storage, settings).in_order_of(index)
    except FileNotFoundError:
        pass
    except DamagedIndex as error:
        problem = f"{storage.location}/{ATTRIBUTES_FILE} is damaged: {error}"
    return ListedAttributes(
        numbers={name: np.full(len(index), np.nan) for name in NUMBERS},
        texts={
            name: TextColumn(
                rows=np.full(len(index), -1, np.int32), texts=PackedText.from_strings(())
            )
            for name in TEXTS
        },
        missing=tuple(index.shard_names),
        problem=problem,
    )


def value_of(attributes: Mapping[str, JSON], name: str) -> JSON:
    """The attribute of that name, None if there is none; a dot goes into an object."""
    value: JSON = dict(attributes)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def number_of(value: JSON) -> float:
    """NaN for anything but a number that float64 holds exactly."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= _MAX_EXACT):
        return float(value)
    return np.nan


def text_of(value: JSON) -> str | None:
    """None for anything but a text or a list of texts."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "+".join(map(str, value))
    return value if isinstance(value, str) else None
