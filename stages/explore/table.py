"""All clips of a cache as columns: keys at once, recorded qualities and captions as they are read.

Rows are the stored clips of every size, then the skipped ones. A million rows are held as packed
arrays, not as Python objects.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache_schema import CacheError, ClipEntry, PackedText, SortedText, StoreReader
from stages.explore.search import SEPARATOR, containing, without_separators
from stages.explore.stores import SizeStores
from stages.inspect_cache.clip_facts import clip_columns, clip_line

NUMBERS = {
    "quality": "cycle consistency",
    "valid": "valid frames",
    "lost": "lost frames",
    "lost_at": "lost for good at frame",
    "confidence": "prompt confidence",
}
"""Columns of numbers, and what a page calls them."""

LABELS = {"prompt": "prompt", "size": "size", "reason": "skipped because"}
"""Columns of words, and what a page calls them."""

_UNKNOWN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Skipped:
    """The skipped clips, in packed columns."""

    keys: PackedText
    details: PackedText
    shards: PackedText
    sizes: np.ndarray
    """Number of the size whose store lists the clip."""


class ClipTable:
    """Columns over all clips; `read` fills them, in a thread of its own if need be.

    Values that no record holds, or that are not read yet, are NaN in columns of numbers and -1 in
    columns of words.
    """

    def __init__(self, sizes: Sequence[SizeStores]) -> None:
        """Load the indexes of the listed stores; reads no commit record."""
        self.sizes = tuple(sizes)
        counts = [len(size.listed) for size in sizes]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.num_stored = int(self.starts[-1])
        self.num_read = 0
        """Clips whose values are known."""
        self.num_shards_read = 0
        """Shards whose records had to be read: `attributes.npz` of their store lacks them."""
        self.num_captions = 0
        self.problems: list[str] = []
        """Records that could not be read, and other reasons for missing values."""
        self.finished = False
        self.names: dict[str, list[str]] = {name: [] for name in LABELS}
        """Words of each column of words, by code."""
        self.numbers = {name: self._unknown(np.float32, np.nan) for name in NUMBERS}
        self.codes = {name: self._unknown(np.int32, _UNKNOWN) for name in LABELS}
        for number, size in enumerate(sizes):
            rows = slice(int(self.starts[number]), int(self.starts[number + 1]))
            self.codes["size"][rows] = self._code("size", size.size or "unknown")
        self._skipped: _Skipped | None = None
        self._captions: list[PackedText] = []
        self._caption_starts: list[int] = []
        self._rows_with_caption: list[tuple[np.ndarray, np.ndarray]] = []
        self._caption_of_row = self._unknown(np.int32, _UNKNOWN)

    def _unknown(self, dtype: type, value: float) -> np.ndarray:
        return np.full(self.num_stored, value, dtype)

    def _code(self, column: str, name: str) -> int:
        names = self.names[column]
        if name not in names:
            names.append(name)
        return names.index(name)

    def __len__(self) -> int:
        return self.num_stored + (0 if self._skipped is None else len(self._skipped.keys))

    @property
    def version(self) -> tuple[int, int, int]:
        """Changes whenever more has been read."""
        return len(self), self.num_read, self.num_captions

    def size_of(self, row: int) -> SizeStores:
        """The stores that a clip belongs to."""
        if row >= self.num_stored:
            assert self._skipped is not None
            return self.sizes[int(self._skipped.sizes[row - self.num_stored])]
        return self.sizes[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def key(self, row: int) -> str:
        """The key of a row."""
        if row >= self.num_stored:
            assert self._skipped is not None
            return self._skipped.keys[row - self.num_stored]
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sizes[number].listed.keys[row - int(self.starts[number])]

    def row_of(self, key: str) -> int | None:
        """The row of a key, among stored clips first; None if there is none."""
        for start, size in zip(self.starts, self.sizes, strict=False):
            row = size.listed.keys.find(key)
            if row is not None:
                return int(start) + row
        if self._skipped is not None and key in self._skipped.keys:
            return self.num_stored + self._skipped.keys.index(key)
        return None

    def shard(self, row: int) -> str:
        """Name of the clip's shard in the listed store."""
        if row >= self.num_stored:
            assert self._skipped is not None
            return self._skipped.shards[row - self.num_stored]
        return self.size_of(row).listed.shard_of(self.key(row))

    def detail(self, row: int) -> str:
        """What extraction said of a skipped clip; empty for others."""
        if row < self.num_stored or self._skipped is None:
            return ""
        return self._skipped.details[row - self.num_stored]

    def caption(self, row: int) -> str | None:
        """The caption, None if there is none or it is not read yet."""
        if row >= self.num_stored or (place := int(self._caption_of_row[row])) < 0:
            return None
        block = int(np.searchsorted(self._caption_starts, place, side="right")) - 1
        return self._captions[block][place - self._caption_starts[block]]

    def number(self, name: str, row: int) -> float | None:
        """A value of a column of numbers, None if it is unknown."""
        value = float(self.numbers[name][row])
        return None if np.isnan(value) else value

    def word(self, name: str, row: int) -> str | None:
        """A value of a column of words, None if it is unknown."""
        code = int(self.codes[name][row])
        return None if code < 0 else self.names[name][code]

    def matching(self, search: str) -> np.ndarray:
        """Rows whose key or caption contain every word of `search`, ignoring case: bool [rows]."""
        words = [word for word in search.casefold().split() if SEPARATOR not in word]
        found = np.zeros((len(words), len(self)), bool)
        for first, size in zip(self.starts.tolist(), self.sizes, strict=False):
            keys = size.listed.keys
            found[:, first : first + len(keys)] = containing(keys, words)
        if self._skipped is not None and found.shape[1] > self.num_stored:
            found[:, self.num_stored :] = containing(self._skipped.keys, words)
        for (rows, numbers), captions in zip(self._rows_with_caption, self._captions, strict=False):
            has = containing(captions, words)
            for word in range(len(words)):
                found[word, rows[has[word, numbers]]] = True
        in_all: np.ndarray = np.logical_and.reduce(found, axis=0)
        return in_all

    def read(self, stop: threading.Event) -> None:
        """Read the skipped clips, and the records of all clips; returns early once `stop` is set.

        A record that cannot be read is noted in `problems`; its clips keep unknown values.
        """
        self._read_skipped()
        captions_known: set[str] = set()
        for start, size in zip(self.starts.tolist(), self.sizes, strict=False):
            listed = size.listed
            missing = self._take_listed(start, listed)
            for entries in self._records(listed, missing, stop):
                for row, entry in zip(_rows_of(entries, listed.keys), entries, strict=True):
                    assert row >= 0, "the records are those of the index"
                    self._take(start + row, entry)
                self.num_read += len(entries)
            text = size.readers.get("text")
            if text is not None:
                if str(text.path) not in captions_known:
                    self._read_captions(text, stop)
                captions_known.add(str(text.path))
        self.finished = not stop.is_set()

    def _take_listed(self, first: int, reader: StoreReader) -> Sequence[str]:
        """Enter the clips whose attributes the store lists; returns the other shards."""
        listed = reader.listed_attributes()
        self._note(listed.problem)
        columns = clip_columns(listed)
        rows = slice(first, first + len(reader))
        for name in NUMBERS:
            self.numbers[name][rows] = columns.numbers[name]
        codes = [self._code("prompt", prompt) for prompt in columns.prompts.texts]
        # The last place is that of -1.
        self.codes["prompt"][rows] = np.array([*codes, _UNKNOWN])[columns.prompts.rows]
        missing = set(listed.missing)
        self.num_read += sum(
            shard.num_clips for shard in reader.shards.values() if shard.name not in missing
        )
        return listed.missing

    def _note(self, problem: str) -> None:
        if problem and problem not in self.problems:
            self.problems.append(problem)

    def _take(self, row: int, entry: ClipEntry) -> None:
        """Enter a clip's record."""
        line = clip_line(entry)
        for name in NUMBERS:
            value = getattr(line, name)
            if value is not None:
                self.numbers[name][row] = value
        if line.prompt is not None:
            self.codes["prompt"][row] = self._code("prompt", line.prompt)

    def _records(
        self, reader: StoreReader, shards: Sequence[str], stop: threading.Event
    ) -> Iterator[Sequence[ClipEntry]]:
        """The records of some shards of a store, one by one."""
        self.num_shards_read += len(shards)
        # A copy shares the index, but has a cache of records of its own.
        reader = copy.copy(reader)
        for shard in shards:
            if stop.is_set():
                return
            try:
                yield reader.records(shard)
            except CacheError as error:
                self.problems.append(str(error))

    def _read_captions(self, text: StoreReader, stop: threading.Event) -> None:
        listed = text.listed_attributes()
        self._note(listed.problem)
        column = listed.texts["caption"]
        places = np.concatenate([text.keys.rows_of(size.listed.keys) for size in self.sizes])
        with_text = np.flatnonzero(places >= 0)
        numbers = column.rows[places[with_text]]
        texts = without_separators(column.texts)
        self._add_captions(with_text[numbers >= 0], numbers[numbers >= 0], texts)
        for entries in self._records(text, listed.missing, stop):
            rows, captions = [], []
            for start, size in zip(self.starts.tolist(), self.sizes, strict=False):
                for row, entry in zip(_rows_of(entries, size.listed.keys), entries, strict=True):
                    caption = entry.attributes.get("caption")
                    if row >= 0 and isinstance(caption, str):
                        rows.append(start + row)
                        captions.append(caption.replace(SEPARATOR, " "))
            packed = PackedText.from_strings(captions)
            self._add_captions(np.array(rows, np.int64), np.arange(len(rows)), packed)

    def _add_captions(self, rows: np.ndarray, numbers: np.ndarray, captions: PackedText) -> None:
        """Enter captions, and for each of some rows the number of its own."""
        first = self.num_captions
        self._captions.append(captions)
        self._caption_starts.append(first)
        self._rows_with_caption.append((rows, numbers))
        self._caption_of_row[rows] = first + numbers
        self.num_captions += len(captions)

    def _read_skipped(self) -> None:
        """Take the skipped clips from the indexes, each key once."""
        seen: set[str] = set()
        keys, details, shards, sizes, reasons = [], [], [], [], []
        for number, size in enumerate(self.sizes):
            for reader in size.readers.values():
                for clip in reader.iter_skipped():
                    if clip.key in seen or clip.key in size.listed:
                        continue
                    seen.add(clip.key)
                    keys.append(clip.key)
                    details.append(clip.detail)
                    shards.append(clip.shard)
                    sizes.append(number)
                    reasons.append(self._code("reason", clip.reason))
        extra = len(keys)
        self.numbers = {
            name: np.concatenate([column, np.full(extra, np.nan, np.float32)])
            for name, column in self.numbers.items()
        }
        codes = {
            name: np.concatenate([column, np.full(extra, _UNKNOWN, np.int32)])
            for name, column in self.codes.items()
        }
        codes["reason"][self.num_stored :] = reasons
        codes["size"][self.num_stored :] = sizes
        self.codes = codes
        self._skipped = _Skipped(
            keys=PackedText.from_strings(keys),
            details=PackedText.from_strings(details),
            shards=PackedText.from_strings(shards),
            sizes=np.array(sizes, np.int32),
        )


def _rows_of(entries: Sequence[ClipEntry], keys: SortedText) -> list[int]:
    """Row of each entry's key among `keys`, -1 if it is missing."""
    order = sorted(range(len(entries)), key=lambda place: entries[place].key)
    found = keys.rows_of(SortedText.from_strings(entries[place].key for place in order))
    rows = np.empty(len(entries), np.int64)
    rows[order] = found
    in_order: list[int] = rows.tolist()
    return in_order
