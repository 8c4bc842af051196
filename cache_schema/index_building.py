"""Building the columns of `index.npz` from commit records, and merging columns of two indexes."""

from array import array
from collections.abc import Iterable, Mapping

import numpy as np

from cache_schema.index_columns import ARRAY_COLUMNS, COLUMNS, Columns
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.records import CommitRecord

_FINGERPRINT = COLUMNS["clips.fingerprint"]


class DuplicateKey(ValueError):  # noqa: N818 (named after the condition, like the other errors)
    """Two clips of the store have the same key."""

    def __init__(self, key: str, shards: tuple[str, str]) -> None:
        super().__init__(f"clip {key!r} is in shards {shards[0]!r} and {shards[1]!r}")


def columns_of_records(
    records: Iterable[tuple[CommitRecord, int]], arrays: Iterable[str]
) -> Columns:
    """Build the columns from commit records, each with its `crc32c`.

    Records are consumed one at a time and not kept. Raises `DuplicateKey` if two clips have the
    same key.
    """
    names = tuple(arrays)
    keys: list[bytes] = []
    shards: list[tuple[str, str, int, int, int]] = []
    skipped: list[tuple[str, str, str]] = []
    fingerprints, skipped_fingerprints = bytearray(), bytearray()
    clip_shard, clip_index, skipped_shard = array("I"), array("I"), array("I")
    facts = {name: (array("Q"), array("I"), array("I")) for name in names}  # as `FileFacts`
    for number, (record, crc32c) in enumerate(records):
        shards.append((record.shard, record.source, record.generation, record.group, crc32c))
        for clip in record.clips:
            keys.append(clip.key.encode("utf-8"))
            clip_shard.append(number)
            clip_index.append(clip.index)
            fingerprints += clip.fingerprint.encode("ascii")
            for name in names:
                for column, fact in zip(facts[name], clip.arrays[name].facts, strict=True):
                    column.append(fact)
        for skipped_clip in record.skipped:
            skipped.append((skipped_clip.key, skipped_clip.reason, skipped_clip.detail))
            skipped_fingerprints += skipped_clip.fingerprint.encode("ascii")
            skipped_shard.append(number)
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    found: Columns = {
        **_text("keys", SortedText.from_utf8(keys[row] for row in order.tolist())),
        "clips.shard": np.frombuffer(clip_shard, np.uint32)[order],
        "clips.index": np.frombuffer(clip_index, np.uint32)[order],
        "clips.fingerprint": np.frombuffer(fingerprints, _FINGERPRINT)[order],
        **_text("shards.name", PackedText.from_strings(shard[0] for shard in shards)),
        **_text("shards.source", PackedText.from_strings(shard[1] for shard in shards)),
        "shards.generation": np.array([shard[2] for shard in shards], np.uint32),
        "shards.group": np.array([shard[3] for shard in shards], np.uint32),
        "shards.crc32c": np.array([shard[4] for shard in shards], np.uint32),
        **_text("skipped.key", PackedText.from_strings(clip[0] for clip in skipped)),
        **_text("skipped.reason", PackedText.from_strings(clip[1] for clip in skipped)),
        **_text("skipped.detail", PackedText.from_strings(clip[2] for clip in skipped)),
        "skipped.fingerprint": np.frombuffer(skipped_fingerprints, _FINGERPRINT),
        "skipped.shard": np.frombuffer(skipped_shard, np.uint32),
    }
    for name in names:
        for (column_name, dtype), column in zip(ARRAY_COLUMNS.items(), facts[name], strict=True):
            found[f"arrays.{name}.{column_name}"] = np.frombuffer(column, dtype)[order]
    by_name = sorted(range(len(shards)), key=lambda number: shards[number][0])
    found = _with_shards(found, np.array(by_name, np.int64))
    _refuse_duplicates(keys, order, found)
    return found


def merged_columns(old: Columns, kept: np.ndarray, new: Columns) -> Columns:
    """Merge the `kept` shards of `old` (one boolean each) with all shards of `new`.

    No shard may be in both. Raises `DuplicateKey` if a key is.
    """
    old = _of_shards(old, kept)
    old_keys = SortedText(old["keys.text"], old["keys.ends"])
    new_keys = SortedText(new["keys.text"], new["keys.ends"])
    positions = np.empty(len(new_keys), np.int64)
    row = 0
    for piece in new_keys.pieces():
        for key in piece:
            positions[row] = position = old_keys.position(key)
            if position < len(old_keys) and old_keys.utf8(position) == key:
                shards = (_shard_name(old, position), _shard_name(new, row))
                raise DuplicateKey(key.decode("utf-8"), shards)
            row += 1
    order = np.insert(np.arange(len(old_keys)), positions, np.arange(len(new_keys)) + len(old_keys))
    num_shards = len(old["shards.crc32c"])
    found: Columns = {}
    for name in old:  # one column at a time: together they are as large as the index
        if name.endswith(".text"):
            ends = f"{name[:-5]}.ends"
            text = PackedText(
                np.concatenate([old[name], new[name]]),
                np.concatenate([old[ends], new[ends] + np.uint64(len(old[name]))]),
            )
            found |= _text(name[:-5], text.take(order) if name == "keys.text" else text)
        elif not name.endswith(".ends"):
            added = new[name]
            if name in ("clips.shard", "skipped.shard"):
                added = added + added.dtype.type(num_shards)
            both = np.concatenate([old[name], added])
            found[name] = both[order] if name.startswith(("clips.", "arrays.")) else both
    names = list(PackedText(found["shards.name.text"], found["shards.name.ends"]))
    return _with_shards(found, np.array(sorted(range(len(names)), key=names.__getitem__), np.int64))


def _of_shards(columns: Columns, kept: np.ndarray) -> Columns:
    if kept.all():
        return columns
    clips = np.flatnonzero(kept[columns["clips.shard"]])
    skipped = np.flatnonzero(kept[columns["skipped.shard"]])
    columns = _rows(columns, clips, "keys", "clips.", "arrays.")
    return _with_shards(_rows(columns, skipped, "skipped."), np.flatnonzero(kept))


def _with_shards(columns: Columns, rows: np.ndarray) -> Columns:
    """Reorder the shards by `rows`, and renumber the shards of clips accordingly."""
    number = np.zeros(len(columns["shards.crc32c"]), np.uint32)
    number[rows] = np.arange(len(rows), dtype=np.uint32)
    found = _rows(columns, rows, "shards.")
    found["clips.shard"] = number[columns["clips.shard"]]
    found["skipped.shard"] = number[columns["skipped.shard"]]
    # A stable sort keeps the order of the record within each shard.
    return _rows(found, np.argsort(found["skipped.shard"], kind="stable"), "skipped.")


def _rows(columns: Columns, rows: np.ndarray, *prefixes: str) -> Columns:
    found = dict(columns)
    for name in columns:
        if name.startswith(prefixes) and name.endswith(".text"):
            what = name[:-5]
            text = PackedText(columns[name], columns[f"{what}.ends"])
            found |= _text(what, text.take(rows))
        elif name.startswith(prefixes) and not name.endswith(".ends"):
            found[name] = columns[name][rows]
    return found


def _text(name: str, text: PackedText) -> Columns:
    return {f"{name}.text": text.blob, f"{name}.ends": text.ends}


def _refuse_duplicates(
    keys: list[bytes], order: np.ndarray, columns: Mapping[str, np.ndarray]
) -> None:
    rows = order.tolist()
    for position in range(1, len(rows)):
        if keys[rows[position]] == keys[rows[position - 1]]:
            shards = (_shard_name(columns, position - 1), _shard_name(columns, position))
            raise DuplicateKey(keys[rows[position]].decode("utf-8"), shards)


def _shard_name(columns: Mapping[str, np.ndarray], row: int) -> str:
    names = PackedText(columns["shards.name.text"], columns["shards.name.ends"])
    return names[int(columns["clips.shard"][row])]
