"""Validation of an index from an untrusted source: only contents that commit records could have.

All rows are checked in numpy, a fraction of a second for a million clips, and block by block, so
that temporary memory stays small compared to the columns.
"""

import itertools
import operator
from collections.abc import Iterator, Mapping

import numpy as np

from cache_schema.names import (
    MAX_CLIP_INDEX,
    MAX_GENERATION,
    check_identifier,
    check_key,
    is_shard_name,
)
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.schema import StoreSettings
from cache_schema.zarr_shard import file_bytes_range

_SLASH, _DOT = b"/."
_HEX = b"0123456789abcdef"

_BLOCK_ROWS = 16_384
"""Rows per block."""


def check_columns(columns: Mapping[str, np.ndarray], settings: StoreSettings) -> None:
    """Raise `ValueError` for names, keys, sizes or numbers that no record may have."""
    shards = SortedText(columns["shards.name.text"], columns["shards.name.ends"])
    names = list(shards)
    for name in names:
        if not is_shard_name(name):
            raise ValueError(f"it has a shard with the invalid name {name!r}")
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise ValueError("its shards are not in ascending order of names")
    if (columns["shards.generation"] > MAX_GENERATION).any():
        raise ValueError("a shard's generation is too large")
    if (columns["shards.group"] > columns["shards.generation"]).any():
        raise ValueError("a shard's group is of a later generation than the shard")
    keys = SortedText(columns["keys.text"], columns["keys.ends"])
    _check_keys(keys)
    _check_order(keys)
    _check_keys(PackedText(columns["skipped.key.text"], columns["skipped.key.ends"]))
    for column in ("shards.source", "skipped.detail"):
        texts = PackedText(columns[f"{column}.text"], columns[f"{column}.ends"])
        for _, blob, ends in _blocks(texts):
            _check_utf8(blob, ends)
    reasons = PackedText(columns["skipped.reason.text"], columns["skipped.reason.ends"])
    for reason in set(itertools.chain.from_iterable(reasons.pieces())):
        check_identifier(reason.decode("utf-8"), "reason for skipping a clip")
    for column in ("clips.fingerprint", "skipped.fingerprint"):
        for first in range(0, len(columns[column]), _BLOCK_ROWS):
            if columns[column][first : first + _BLOCK_ROWS].tobytes().translate(None, _HEX):
                raise ValueError(f"{column} has a value that is not a fingerprint")
    if (columns["clips.index"] > MAX_CLIP_INDEX).any():
        raise ValueError("a clip's index is too large")
    for name, spec in settings.arrays.items():
        minimum, maximum = file_bytes_range(spec)
        sizes = columns[f"arrays.{name}.bytes"]
        if ((sizes < minimum) | (sizes > maximum)).any():
            raise ValueError(f"a file of array {name} is not of {minimum} to {maximum} bytes")


def _blocks(texts: PackedText) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Texts block by block: the first one's row, their bytes, and the end of each in these."""
    for first in range(0, len(texts), _BLOCK_ROWS):
        ends = texts.ends[first : first + _BLOCK_ROWS]
        origin = texts.ends[first - 1] if first else np.uint64(0)
        yield first, texts.blob[origin : ends[-1]], ends - origin


def _check_utf8(blob: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Start of each text of a block; `ValueError` unless all of them are UTF-8."""
    blob.tobytes().decode("utf-8")
    starts = np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
    if (blob[starts[starts < len(blob)]] & 0xC0 == 0x80).any():
        raise ValueError("a text begins inside a character")
    return starts


def _check_keys(keys: PackedText) -> None:
    """Apply `check_key`, but call it only for texts that might violate it."""
    for first, blob, ends in _blocks(keys):
        starts = _check_utf8(blob, ends)
        lengths = ends - starts
        doubtful = (lengths == 0) | (lengths > 256)
        doubtful[lengths > 0] |= blob[starts[lengths > 0]] == _SLASH
        odd = (blob < 0x20) | (blob == 0x7F)
        # A C1 control is 0xC2 followed by a byte below 0xA0; '..' is any two dots in a row.
        odd[1:] |= (blob[:-1] == 0xC2) & (blob[1:] < 0xA0)
        odd[1:] |= (blob[:-1] == _DOT) & (blob[1:] == _DOT)
        doubtful[np.searchsorted(ends, np.flatnonzero(odd), side="right")] = True
        for row in np.flatnonzero(doubtful).tolist():
            check_key(keys[first + row])


def _check_order(keys: PackedText) -> None:
    before = b""
    for piece in keys.pieces():
        if before >= piece[0] or any(map(operator.ge, piece, piece[1:])):
            raise ValueError("its keys are not in order")
        before = piece[-1]
