"""Building `attributes.npz` from commit records, and updating it."""

import os
from array import array
from contextlib import suppress

import numpy as np

from cache_schema.atomic_io import FileLock, add_path_to_errors, open_for_writing, sync
from cache_schema.attribute_table import (
    COLUMNS,
    NUMBERS,
    SHARD_COLUMNS,
    TEXTS,
    AttributeTable,
    number_of,
    read_attributes,
    text_of,
    value_of,
)
from cache_schema.index import read_commit_crc32c_digits
from cache_schema.index_columns import DamagedIndex, read_archive, write_archive
from cache_schema.names import ATTRIBUTES_FILE, StoreLayout
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.records import CommitRecord, committed_shards, read_commit_with_crc32c
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalStorage


class _Texts:
    """A column of texts being built."""

    def __init__(self) -> None:
        self.rows = array("i")
        self._row_of: dict[str, int] = {}

    def row_of(self, text: str | None) -> int:
        return -1 if text is None else self._row_of.setdefault(text, len(self._row_of))

    def packed(self) -> PackedText:
        return PackedText.from_strings(self._row_of)


class TableBuilder:
    """The columns of a table, built shard by shard in ascending order of names."""

    def __init__(self) -> None:
        self.shards: list[tuple[str, int, int]] = []
        self.numbers = {name: array("d") for name in NUMBERS}
        self.texts = {name: _Texts() for name in TEXTS}

    def add(self, record: CommitRecord, crc32c: int) -> None:
        """Add a shard from its record, which has this `crc32c`."""
        for clip in record.clips:
            for name, column in self.numbers.items():
                column.append(number_of(value_of(clip.attributes, name)))
            for name, text in self.texts.items():
                text.rows.append(text.row_of(text_of(value_of(clip.attributes, name))))
        self._end(record.shard, crc32c)

    def keep(self, table: AttributeTable, rows: range, shard: str, crc32c: int) -> None:
        """Add a shard of an earlier table."""
        for name, column in self.numbers.items():
            column.frombytes(table.numbers[name][rows.start : rows.stop].astype("d").tobytes())
        for name, text in self.texts.items():
            earlier = table.texts[name]
            different, places = np.unique(earlier.rows[rows.start : rows.stop], return_inverse=True)
            # In the order of first use, as `add` numbers them.
            first_use = np.argsort(np.unique(places, return_index=True)[1])
            renumbered = np.empty(len(different), "i")
            for place in first_use.tolist():
                row = int(different[place])
                renumbered[place] = text.row_of(None if row < 0 else earlier.texts[row])
            text.rows.frombytes(renumbered[places].tobytes())
        self._end(shard, crc32c)

    def _end(self, shard: str, crc32c: int) -> None:
        self.shards.append((shard, crc32c, len(self.numbers[NUMBERS[0]])))

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of the shards added so far."""
        names = PackedText.from_strings(shard for shard, _, _ in self.shards)
        found: dict[str, np.ndarray] = {
            "shards.name.text": names.blob,
            "shards.name.ends": names.ends,
            "shards.crc32c": np.array([crc32c for _, crc32c, _ in self.shards], np.uint32),
            "shards.end": np.array([end for _, _, end in self.shards], np.uint64),
        }
        for name, column in self.numbers.items():
            found[f"numbers.{name}"] = np.frombuffer(column, np.float64)
        for name, text in self.texts.items():
            packed = text.packed()
            found[f"texts.{name}.row"] = np.frombuffer(text.rows, np.int32)
            found[f"texts.{name}.text"], found[f"texts.{name}.ends"] = packed.blob, packed.ends
        return found


def lists_all_shards(layout: StoreLayout, settings: StoreSettings) -> bool:
    """Whether `attributes.npz` lists exactly the current commit records; parses none."""
    try:
        columns = read_archive(layout.attributes, SHARD_COLUMNS, settings)
        names = list(SortedText(columns["shards.name.text"], columns["shards.name.ends"]))
    except (FileNotFoundError, ValueError):
        return False
    storage = LocalStorage(layout.root)
    return names == committed_shards(layout) and all(
        read_commit_crc32c_digits(storage, name) == b"%08x" % crc32c
        for name, crc32c in zip(names, columns["shards.crc32c"].tolist(), strict=True)
    )


def write_attributes(layout: StoreLayout, settings: StoreSettings, lock: FileLock) -> None:
    """Update `attributes.npz` from the commit records; parses only those it lacks.

    Raises:
        CorruptRecord: a commit record is damaged.
        LockLost: `lock`, the store's lock, is no longer held.
    """
    storage = LocalStorage(layout.root)
    earlier = None
    with suppress(FileNotFoundError, DamagedIndex):
        earlier = read_attributes(storage, settings)
    builder = TableBuilder()
    for shard in committed_shards(layout):
        crc32c = int(read_commit_crc32c_digits(storage, shard), 16)
        rows = None if earlier is None else earlier.rows_of(shard, crc32c)
        if earlier is None or rows is None:
            builder.add(*read_commit_with_crc32c(layout, settings, shard))
        else:
            builder.keep(earlier, rows, shard, crc32c)
    temporary = layout.staging / f".{ATTRIBUTES_FILE}"
    temporary.unlink(missing_ok=True)  # a writer that lost the lock may still have it open
    with add_path_to_errors(layout.attributes), open_for_writing(temporary) as file:
        write_archive(file, builder.columns(), COLUMNS, settings)
        file.flush()
        os.fsync(file.fileno())
    lock.check()
    temporary.rename(layout.attributes)
    sync(layout.root)
