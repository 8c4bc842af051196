"""Sequences of many short texts packed into two arrays, in memory and in `index.npz`.

A million keys of 20 bytes take 28 MB, against 70 MB and more as `str` objects. Forked processes
share the arrays, since they have no per-text reference counts.
"""

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Self, overload

import numpy as np

_BATCH = 16_384
"""Texts decoded at a time when iterating over all of them."""

_SPARSE_RATIO = 16
"""Searched texts per text sought from which on each one is found by bisection."""

_BLOCK_LENGTH = 64
"""Texts per block of the two-level bisection."""


class PackedText(Sequence[str]):
    """A sequence of texts, stored as concatenated UTF-8 and the end of each text.

    Equal to any list or tuple of the same texts.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        """Take the arrays without copying them where possible.

        Args:
            blob: uint8, the concatenated UTF-8 of all texts.
            ends: uint64, for every text the position in `blob` after its last byte.

        Raises:
            ValueError: `ends` decreases, or its last value is not the length of `blob`.
        """
        self.blob = np.ascontiguousarray(blob, np.uint8)
        self.ends = np.ascontiguousarray(ends, np.uint64)
        last = int(self.ends[-1]) if len(self.ends) else 0
        if last != len(self.blob) or (self.ends[1:] < self.ends[:-1]).any():
            raise ValueError("the ends of packed texts do not fit their bytes")
        self._make_views()

    def _make_views(self) -> None:
        # Access to single items is much faster than with the arrays.
        self._bytes = self.blob.data
        self._ends = self.ends.data

    def __getstate__(self) -> tuple[np.ndarray, np.ndarray]:
        return self.blob, self.ends

    def __setstate__(self, state: tuple[np.ndarray, np.ndarray]) -> None:
        self.blob, self.ends = state
        self._make_views()

    @classmethod
    def from_strings(cls, texts: Iterable[str]) -> Self:
        """Pack texts, keeping their order."""
        return cls.from_utf8(text.encode("utf-8") for text in texts)

    @classmethod
    def from_utf8(cls, texts: Iterable[bytes]) -> Self:
        """Pack texts that are UTF-8 already, keeping their order."""
        blob, lengths = bytearray(), array("Q")
        for text in texts:
            blob += text
            lengths.append(len(text))
        ends = np.cumsum(np.frombuffer(lengths, np.uint64), dtype=np.uint64)
        return cls(np.frombuffer(blob, np.uint8), ends)

    def __len__(self) -> int:
        return len(self._ends)

    def utf8(self, row: int) -> bytes:
        """One text as UTF-8; `row` counts from 0."""
        return bytes(self._bytes[self._ends[row - 1] if row else 0 : self._ends[row]])

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Self: ...
    def __getitem__(self, row: int | slice) -> "str | Self":
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"text {row} of {len(self)}")
        return self.utf8(number).decode("utf-8")

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[list[bytes]]:
        """The texts of some rows as UTF-8, in batches of some thousand."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, _BATCH):
            last = min(first + _BATCH, stop)
            origin = self._ends[first - 1] if first else 0
            blob = bytes(self._bytes[origin : self._ends[last - 1]])
            bounds = [0, *(self.ends[first:last] - np.uint64(origin)).tolist()]
            yield [blob[a:b] for a, b in itertools.pairwise(bounds)]

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces():
            for text in piece:
                yield text.decode("utf-8")

    def take(self, rows: np.ndarray) -> Self:
        """The texts of these rows, in the order given."""
        starts = np.concatenate([np.zeros(1, np.uint64), self.ends[:-1]])[: len(self)]
        chosen = np.asarray(rows, np.int64)
        lengths = (self.ends - starts)[chosen]
        ends = np.cumsum(lengths, dtype=np.uint64)
        blob = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        filled = 0
        for first in range(0, len(chosen), _BATCH):
            length = lengths[first : first + _BATCH].astype(np.int64)
            before = np.cumsum(length) - length
            shift = starts[chosen[first : first + _BATCH]].astype(np.int64) - before
            count = int(length.sum())
            blob[filled : filled + count] = self.blob[np.arange(count) + np.repeat(shift, length)]
            filled += count
        return type(self)(blob, ends)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedText):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.blob, other.blob)
        if isinstance(other, tuple | list):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(text) for text in itertools.islice(self, 3))
        return f"<{len(self)} texts: {shown}{', …' if len(self) > 3 else ''}>"


class SortedText(PackedText):
    """Unique texts in ascending order of code points, searched by bisection."""

    @cached_property
    def _block_starts(self) -> list[bytes]:
        """The first text of every block, for bisection with the standard library."""
        return [self.utf8(row) for row in range(0, len(self), _BLOCK_LENGTH)]

    def position(self, text: bytes) -> int:
        """Number of texts smaller than `text`, which is UTF-8."""
        block = bisect.bisect_right(self._block_starts, text)
        low, high = max(0, block - 1) * _BLOCK_LENGTH, min(block * _BLOCK_LENGTH, len(self))
        while low < high:
            middle = (low + high) // 2
            # The order of UTF-8 bytes is the order of code points.
            if self.utf8(middle) < text:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, text: str) -> int | None:
        """The row of a text, or None."""
        try:
            wanted = text.encode("utf-8")
        except UnicodeEncodeError:
            return None
        row = self._find(wanted)
        return None if row < 0 else row

    def _find(self, text: bytes) -> int:
        row = self.position(text)
        return row if row < len(self) and self.utf8(row) == text else -1

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and self.find(text) is not None

    def index(self, text: str, start: int = 0, stop: int | None = None) -> int:
        """The row of a text; `ValueError` if it is missing."""
        row = self.find(text)
        if row is None or row not in range(len(self))[start:stop]:
            raise ValueError(f"{text!r} is not among the {len(self)} texts")
        return row

    def rows_of(self, others: "SortedText") -> np.ndarray:
        """Row in this sequence of each text of `others`, -1 if missing; int64, in their order."""
        if others == self:
            return np.arange(len(self), dtype=np.int64)
        found = np.full(len(others), -1, np.int64)
        first = 0
        for piece in others.pieces():
            start, stop = self.position(piece[0]), self.position(piece[-1] + b"\0")
            if stop - start > _SPARSE_RATIO * len(piece):
                rows = [self._find(text) for text in piece]
            else:
                texts = itertools.chain.from_iterable(self.pieces(start, stop))
                here = {text: row for row, text in enumerate(texts, start)}
                rows = [here.get(text, -1) for text in piece]
            found[first : first + len(piece)] = rows
            first += len(piece)
        return found

    def in_all(self, *others: "SortedText") -> "SortedText":
        """Texts that are also in each of the `others`; cheap if the sequences are equal."""
        others = tuple(other for other in others if other != self)
        if not others:
            return self
        return SortedText.from_utf8(self._common(others))

    def _common(self, others: Sequence["SortedText"]) -> Iterator[bytes]:
        reached = [0 for _ in others]
        for piece in self.pieces():
            shared = set(piece)
            for number, other in enumerate(others):
                start, stop = reached[number], other.position(piece[-1] + b"\0")
                shared &= set(itertools.chain.from_iterable(other.pieces(start, stop)))
                reached[number] = stop
            yield from (text for text in piece if text in shared)
