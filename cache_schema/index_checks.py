"""Whether an index is one that records could have given; as if a stranger had written it.

Checked once for all rows, in numpy: a million clips take a fraction of a second. Block by block, so
that a check takes no memory worth mentioning beside the columns.
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

_ROWS = 16_384
"""In a block."""


def check_columns(columns: Mapping[str, np.ndarray], settings: StoreSettings) -> None:
    """`ValueError` for names, keys, sizes or numbers that no record may have."""
    shards = SortedText(columns["shards.name.text"], columns["shards.name.ends"])
    names = list(shards)
    for name in names:
        if not is_shard_name(name):
            raise ValueError(f"it has a shard of the name {name!r}")
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise ValueError("its shards are not in order")
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
        for first in range(0, len(columns[column]), _ROWS):
            if columns[column][first : first + _ROWS].tobytes().translate(None, _HEX):
                raise ValueError(f"{column} holds what is no fingerprint")
    if (columns["clips.index"] > MAX_CLIP_INDEX).any():
        raise ValueError("a clip's index is too large")
    for name, spec in settings.arrays.items():
        least, most = file_bytes_range(spec)
        sizes = columns[f"arrays.{name}.bytes"]
        if ((sizes < least) | (sizes > most)).any():
            raise ValueError(f"a file of array {name} has a size that no clip has")


def _blocks(texts: PackedText) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Some texts at a time: the row of the first, their bytes, and where each one ends in them."""
    for first in range(0, len(texts), _ROWS):
        ends = texts.ends[first : first + _ROWS]
        origin = texts.ends[first - 1] if first else np.uint64(0)
        yield first, texts.blob[origin : ends[-1]], ends - origin


def _check_utf8(blob: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where each text of a block starts; `ValueError` unless all of them are UTF-8."""
    blob.tobytes().decode("utf-8")
    starts = np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
    if (blob[starts[starts < len(blob)]] & 0xC0 == 0x80).any():
        raise ValueError("a text begins inside a character")
    return starts


def _check_keys(keys: PackedText) -> None:
    """By the rule of `check_key`: only texts that might break it are looked at one by one."""
    for first, blob, ends in _blocks(keys):
        starts = _check_utf8(blob, ends)
        lengths = ends - starts
        doubtful = (lengths == 0) | (lengths > 256)
        doubtful[lengths > 0] |= blob[starts[lengths > 0]] == _SLASH
        odd = (blob < 0x20) | (blob == 0x7F)
        # A C1 control is 0xC2 and a byte below 0xA0; '..' is looked for as two bytes.
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
