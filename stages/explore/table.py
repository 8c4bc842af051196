"""All clips of a cache as columns: keys at once, recorded qualities and captions as they are read.

Rows are the stored clips of every size, then the skipped ones. A million rows are held as packed
arrays, not as Python objects.
"""

import copy
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache_schema import CacheError, ClipEntry, PackedText, SortedText, StoreReader
from stages.explore.stores import SizeStores
from stages.inspect_cache.clip_facts import clip_line

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
_SEPARATOR = "\0"
"""Not in any key, and replaced by a space in captions."""


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
        """Clips whose record has been read."""
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
        self._row_of_caption: list[np.ndarray] = []
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
        words = [word for word in search.casefold().split() if _SEPARATOR not in word]
        found = np.zeros((len(words), len(self)), bool)
        for first, size in zip(self.starts.tolist(), self.sizes, strict=False):
            for word, places in _places(size.listed.keys, words):
                found[word, first + places] = True
        if self._skipped is not None and found.shape[1] > self.num_stored:
            for word, places in _places(self._skipped.keys, words):
                found[word, self.num_stored + places] = True
        for rows, captions in zip(self._row_of_caption, self._captions, strict=False):
            for word, places in _places(captions, words):
                found[word, rows[places]] = True
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
            for entries in self._records(listed, stop):
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

    def _take(self, row: int, entry: ClipEntry) -> None:
        """Enter a clip's record."""
        line = clip_line(entry)
        for name in NUMBERS:
            value = getattr(line, name)
            if value is not None:
                self.numbers[name][row] = value
        if line.prompt is not None:
            self.codes["prompt"][row] = self._code("prompt", line.prompt)

    def _records(self, reader: StoreReader, stop: threading.Event) -> Iterator[Sequence[ClipEntry]]:
        """The records of a store, shard by shard."""
        # A copy shares the index, but has a cache of records of its own.
        reader = copy.copy(reader)
        for shard in reader.shards:
            if stop.is_set():
                return
            try:
                yield reader.records(shard)
            except CacheError as error:
                self.problems.append(str(error))

    def _read_captions(self, text: StoreReader, stop: threading.Event) -> None:
        for entries in self._records(text, stop):
            rows, captions = [], []
            for start, size in zip(self.starts.tolist(), self.sizes, strict=False):
                for row, entry in zip(_rows_of(entries, size.listed.keys), entries, strict=True):
                    caption = entry.attributes.get("caption")
                    if row >= 0 and isinstance(caption, str):
                        rows.append(start + row)
                        captions.append(caption.replace(_SEPARATOR, " "))
            self._add_captions(np.array(rows, np.int64), captions)

    def _add_captions(self, rows: np.ndarray, captions: Sequence[str]) -> None:
        first = self.num_captions
        encoded = (caption.encode("utf-8", "replace") for caption in captions)
        self._captions.append(PackedText.from_utf8(encoded))
        self._caption_starts.append(first)
        self._row_of_caption.append(rows)
        self._caption_of_row[rows] = np.arange(first, first + len(rows))
        self.num_captions += len(rows)

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


def _places(texts: PackedText, words: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """For parts of the texts and each word: its number, and which texts contain it, ignoring case.

    The words are folded already.
    """
    first = 0
    separator = _SEPARATOR.encode()
    for piece in texts.pieces():
        folded = separator.join(piece).decode("utf-8").casefold().encode("utf-8")
        ends = np.flatnonzero(np.frombuffer(folded, np.uint8) == 0)
        for number, word in enumerate(words):
            found = [at.start() for at in re.finditer(re.escape(word.encode("utf-8")), folded)]
            yield number, first + np.searchsorted(ends, np.array(found, np.int64))
        first += len(piece)
