"""Which of many texts contain words, ignoring case."""

import re
from collections.abc import Sequence

import numpy as np

from cache_schema import PackedText

SEPARATOR = "\0"
"""In none of the texts."""

_BLOCK = 2**24
"""Bytes compared at a time."""


def without_separators(texts: PackedText) -> PackedText:
    """The texts with spaces for separators; the same object if there are none, as is usual."""
    blob, separator = texts.blob, ord(SEPARATOR)
    if not any((blob[at : at + _BLOCK] == separator).any() for at in range(0, len(blob), _BLOCK)):
        return texts
    return PackedText(np.where(blob == separator, np.uint8(ord(" ")), blob), texts.ends)


def containing(texts: PackedText, words: Sequence[str]) -> np.ndarray:
    """Whether each text contains each word, ignoring case: bool [words, texts].

    Args:
        texts: They do not contain `SEPARATOR`.
        words: Folded already.
    """
    found = np.zeros((len(words), len(texts)), bool)
    first = 0
    separator = SEPARATOR.encode()
    for piece in texts.pieces():
        folded = separator.join(piece).decode("utf-8").casefold().encode("utf-8")
        ends = np.flatnonzero(np.frombuffer(folded, np.uint8) == 0)
        for number, word in enumerate(words):
            at = [match.start() for match in re.finditer(re.escape(word.encode("utf-8")), folded)]
            found[number, first + np.searchsorted(ends, np.array(at, np.int64))] = True
        first += len(piece)
    return found
