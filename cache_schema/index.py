"""Index of all clips of a store in packed columns, sorted by key: location, size and checksum.

It is derived from the commit records and stored in `index.npz`, so that a store of a million clips
opens in a second or two, and so that a store can be read where folders cannot be listed.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from cache_schema.atomic_io import FileLock, add_path_to_errors, open_for_writing, sync
from cache_schema.checksummed_json import HEAD_BYTES, crc32c_digits
from cache_schema.errors import CorruptRecord
from cache_schema.index_building import DuplicateKey, columns_of_records, merged_columns
from cache_schema.index_columns import (
    STORE_CRC32C,
    DamagedIndex,
    check_columns,
    column_types,
    read_columns,
    write_columns,
)
from cache_schema.names import INDEX_FILE, MAX_INDEX_BYTES, STORE_FILE, StoreLayout
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.records import (
    CommitRecord,
    SkippedClip,
    committed_shards,
    parse_commit,
    read_record_file,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import UNREADABLE, LocalStorage, Storage
from cache_schema.zarr_shard import FileFacts


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """Facts about a committed shard that are known without reading its record."""

    name: str
    source: str
    """The input it was made from, such as the name of a tar."""
    generation: int
    """Number of times its record was replaced."""
    group: int
    """Generation in the name of its group's folder."""
    num_clips: int
    num_bytes: int
    """Size of its clips on disk, without metadata."""


class ClipIndex:
    """The columns of `index.npz`; each row is a clip, in ascending order of keys."""

    def __init__(self, columns: Mapping[str, np.ndarray], arrays: Iterable[str]) -> None:
        """Take the columns listed in `index_file` for these arrays.

        Raises `ValueError` if they are inconsistent.
        """
        self.arrays = tuple(arrays)
        self.columns = {name: columns[name] for name in column_types(self.arrays)}
        self.store_crc32c: int | None = None
        """The `crc32c` of `store.json` when this index was written; None if this index is not the
        one on disk."""
        self.keys = SortedText(columns["keys.text"], columns["keys.ends"])
        self.shard_names = SortedText(columns["shards.name.text"], columns["shards.name.ends"])
        self._check()

    def _check(self) -> None:
        skipped = self.columns["skipped.shard"]
        rows = {"shards": len(self.shard_names), "skipped": len(skipped)}
        for name, column in self.columns.items():
            wanted = rows.get(name.split(".")[0], len(self.keys))
            if not name.endswith(".text") and len(column) != wanted:
                raise ValueError(f"column {name} has {len(column)} rows instead of {wanted}")
        for numbers in (self.columns["clips.shard"], skipped):
            if len(numbers) and int(numbers.max()) >= len(self.shard_names):
                raise ValueError("a clip is in a shard that is not listed")

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClipIndex):
            return NotImplemented
        return self.columns.keys() == other.columns.keys() and all(
            np.array_equal(column, other.columns[name]) for name, column in self.columns.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_records(
        cls, records: Iterable[tuple[CommitRecord, int]], arrays: Iterable[str]
    ) -> "ClipIndex":
        """Build the index from commit records, each with its `crc32c`.

        Raises `DuplicateKey` if two clips have the same key.
        """
        names = tuple(arrays)
        return cls(columns_of_records(records, names), names)

    def with_shards(self, newer: "ClipIndex") -> "ClipIndex":
        """This index with the shards of another added, replacing shards of the same name.

        Raises `DuplicateKey` if a key is in shards of both.
        """
        if not len(newer.shard_names):
            return self
        replaced = set(newer.shard_names)
        kept = np.array([name not in replaced for name in self.shard_names], bool)
        columns = merged_columns(self.columns, kept, newer.columns)
        return ClipIndex(columns, self.arrays)

    @cached_property
    def shards(self) -> dict[str, ShardFacts]:
        """The committed shards by name, sorted."""
        number = len(self.shard_names)
        of_clips = self.columns["clips.shard"]
        num_clips = np.bincount(of_clips, minlength=number).tolist()
        num_bytes = np.zeros(number, np.uint64)
        for name in self.arrays:
            np.add.at(num_bytes, of_clips, self.columns[f"arrays.{name}.bytes"])
        sources = PackedText(self.columns["shards.source.text"], self.columns["shards.source.ends"])
        generations, groups = (
            self.columns[f"shards.{name}"].tolist() for name in ("generation", "group")
        )
        facts = map(
            ShardFacts,
            self.shard_names,
            sources,
            generations,
            groups,
            num_clips,
            num_bytes.tolist(),
        )
        return {shard.name: shard for shard in facts}

    def rows_by_record(self) -> np.ndarray:
        """Rows of all clips, shard by shard and in the order of their records; int64."""
        # A record lists its clips in ascending order of their index.
        return np.lexsort((self.columns["clips.index"], self.columns["clips.shard"]))

    def locate(self, row: int) -> tuple[str, int, int]:
        """A clip's shard, the generation of the shard's group, and the clip's index there."""
        shard = int(self.columns["clips.shard"][row])
        group = int(self.columns["shards.group"][shard])
        return self.shard_names[shard], group, int(self.columns["clips.index"][row])

    def file_facts(self, row: int, array: str) -> FileFacts:
        """Recorded facts about a clip's file of one array."""
        columns = (self.columns[f"arrays.{array}.{name}"] for name in FileFacts._fields)
        return FileFacts(*(int(column[row]) for column in columns))

    def record_crc32c(self, shard: str) -> int:
        """The `crc32c` of a shard's commit record."""
        return int(self.columns["shards.crc32c"][self.shard_names.index(shard)])

    def has_record_of(self, storage: Storage, shard: str) -> bool:
        """Whether a shard's commit record in `storage` has the checksum that this index lists."""
        return read_commit_crc32c_digits(storage, shard) == b"%08x" % self.record_crc32c(shard)

    def ambiguous_skips(self) -> set[str]:
        """Keys that are skipped more than once, or both skipped and stored."""
        ends = self.columns["skipped.key.ends"]
        keys = sorted(PackedText(self.columns["skipped.key.text"], ends))
        found = {key for key, following in pairwise(keys) if key == following}
        if len(self.keys):
            unique = SortedText.from_strings(key for key, _ in groupby(keys))
            held = np.flatnonzero(self.keys.rows_of(unique) >= 0)
            found.update(unique[int(row)] for row in held)
        return found

    def all_skipped(self) -> Iterator[SkippedClip]:
        """All skipped clips in the commit records, shard by shard."""
        texts = (
            PackedText(self.columns[f"skipped.{name}.text"], self.columns[f"skipped.{name}.ends"])
            for name in ("key", "reason", "detail")
        )
        names = list(self.shard_names)
        # Not lists, which would hold a Python object per skipped clip.
        fingerprints = map(bytes, self.columns["skipped.fingerprint"])
        shards = self.columns["skipped.shard"].data
        for key, reason, detail, fingerprint, shard in zip(
            *texts, fingerprints, shards, strict=True
        ):
            yield SkippedClip(key, reason, detail, fingerprint.decode("ascii"), names[shard])


def read_index(storage: Storage, settings: StoreSettings) -> ClipIndex:
    """Read `index.npz`; raises `DamagedIndex`, or `FileNotFoundError` if there is none."""
    local = storage.folder / INDEX_FILE if isinstance(storage, LocalStorage) else None
    try:
        return parse_index(local or storage.read(INDEX_FILE, MAX_INDEX_BYTES), settings)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise DamagedIndex(f"it cannot be read ({error.strerror})") from error


def parse_index(source: bytes | Path, settings: StoreSettings) -> ClipIndex:
    """Parse an index archive, treating it as untrusted input; raises `DamagedIndex`."""
    columns = read_columns(source, settings)
    try:
        index = ClipIndex(columns, settings.arrays)
        check_columns(columns, settings)
        (index.store_crc32c,) = columns[STORE_CRC32C].tolist()
    except ValueError as error:
        raise DamagedIndex(f"it is inconsistent ({error})") from error
    return index


def load_index(storage: Storage, settings: StoreSettings) -> ClipIndex:
    """The current index of a store.

    In a local folder the commit records are authoritative: records that `index.npz` lacks, or lists
    with an older generation, are read, and all of them if the file is missing. Elsewhere
    `index.npz` is authoritative.

    Raises:
        CorruptRecord: a commit record is damaged, contradicts another, or is lost (listed in
            `index.npz` but missing); elsewhere, the index is damaged.
        StoreUnreachable: a network storage did not respond.
    """
    if isinstance(storage, LocalStorage):
        return _current_index(storage, settings)
    try:
        return read_index(storage, settings)
    except FileNotFoundError:
        raise CorruptRecord(
            f"{storage.location} has no {INDEX_FILE}; only stores in local folders can be read "
            "without it",
            remedy="copy",
        ) from None
    except DamagedIndex as error:
        raise CorruptRecord(
            f"{storage.location}/{INDEX_FILE} is damaged: {error}", remedy="copy"
        ) from error


def write_index(
    layout: StoreLayout, settings: StoreSettings, lock: FileLock, known: ClipIndex | None = None
) -> ClipIndex:
    """Update `index.npz` from the commit records and return the new index.

    `known` is an index that the caller already has; records that it (or, without it, `index.npz`)
    lacks are read.

    Raises:
        CorruptRecord: a commit record is damaged or lost, or two shards hold the same key.
        LockLost: `lock`, the store's lock, is no longer held.
    """
    storage = LocalStorage(layout.root)
    index = _current_index(storage, settings, known)
    store_crc32c = read_crc32c(storage, STORE_FILE)
    if index.store_crc32c == store_crc32c:
        return index
    layout.staging.mkdir(exist_ok=True)
    temporary = layout.staging / f".{INDEX_FILE}"
    temporary.unlink(missing_ok=True)  # a writer that lost the lock may still have it open
    with add_path_to_errors(layout.index), open_for_writing(temporary) as file:
        write_columns(file, index.columns, settings, store_crc32c)
        file.flush()
        os.fsync(file.fileno())
    lock.check()
    temporary.rename(layout.index)
    sync(layout.root)
    return index


def is_indexed(layout: StoreLayout, settings: StoreSettings) -> bool:
    """Whether `index.npz` is valid and matches the commit records; parses no record."""
    storage = LocalStorage(layout.root)
    try:
        index = read_index(storage, settings)
    except (FileNotFoundError, DamagedIndex):
        return False
    listed = set(index.shard_names)
    return (
        index.store_crc32c == read_crc32c(storage, STORE_FILE)
        and listed == set(committed_shards(layout))
        and listed == _unchanged_shards(storage, index)
    )


def index_of_records(storage: Storage, settings: StoreSettings, shards: Iterable[str]) -> ClipIndex:
    """Build the index from the commit records of these shards, ignoring `index.npz`.

    Raises `CorruptRecord`.
    """
    try:
        return ClipIndex.from_records(_read_records(storage, settings, shards), settings.arrays)
    except DuplicateKey as error:
        raise _duplicate_key_error(storage, error) from error


def read_commit_crc32c_digits(storage: Storage, shard: str) -> bytes:
    """The `crc32c` digits of a commit record; not validated."""
    return storage.read_range(commit_path(shard), 0, HEAD_BYTES)[-8:]


def read_crc32c(storage: Storage, path: str) -> int:
    """The `crc32c` of an intact record."""
    return int(crc32c_digits(storage.read_range(path, 0, HEAD_BYTES)), 16)


def commit_path(shard: str) -> str:
    """Path of a shard's commit record, relative to the store."""
    return f"commits/{shard}.json"


def _current_index(
    storage: LocalStorage, settings: StoreSettings, known: ClipIndex | None = None
) -> ClipIndex:
    # Read the index before listing the records, so that every record it lists is already committed.
    index = known
    if index is None:
        with suppress(FileNotFoundError, DamagedIndex):
            index = read_index(storage, settings)
    shards = committed_shards(StoreLayout(storage.folder))
    if index is None:
        return index_of_records(storage, settings, shards)
    kept = _unchanged_shards(storage, index)
    changed = [shard for shard in shards if shard not in kept]
    if not changed and len(kept) == len(index.shard_names):
        return index
    newer = index_of_records(storage, settings, changed)
    _check_lost_records(storage, index, newer, kept)
    try:
        return index.with_shards(newer)
    except DuplicateKey as error:
        raise _duplicate_key_error(storage, error) from error


def _check_lost_records(
    storage: Storage, index: ClipIndex, newer: ClipIndex, kept: Collection[str]
) -> None:
    """Raise `CorruptRecord` if the index lists a commit record that is no longer there."""
    for shard, known in index.shards.items():
        if shard in kept:
            continue
        found = newer.shards.get(shard)
        if found is None or found.generation <= known.generation:
            raise CorruptRecord(
                f"{storage.location}/{commit_path(shard)} {describe_lost_record(known, found)}",
                remedy="repair",
                subject=storage.location,
            )


def describe_lost_record(known: ShardFacts, found: ShardFacts | None) -> str:
    """Describe a shard whose commit record is not the one listed in the index.

    `found` has an older generation than `known`, or the same; None if there is no record. A newer
    record is valid: the index is written after the records.
    """
    if found is None:
        return f"cannot be found, but {INDEX_FILE} lists {known.num_clips} clips of it"
    if found.generation < known.generation:
        return (
            f"has generation {found.generation}, but {INDEX_FILE} lists generation "
            f"{known.generation}: an older version was restored"
        )
    return f"is not the one that {INDEX_FILE} lists: it was changed or replaced"


def _unchanged_shards(storage: LocalStorage, index: ClipIndex) -> set[str]:
    """Shards of an index whose commit records still have the checksum it lists."""
    crc32cs = index.columns["shards.crc32c"].tolist()
    same = set()
    for shard, crc32c in zip(index.shard_names, crc32cs, strict=True):
        with suppress(OSError):  # the whole record is read again, and reports the error
            if read_commit_crc32c_digits(storage, shard) == b"%08x" % crc32c:
                same.add(shard)
    return same


def _read_records(
    storage: Storage, settings: StoreSettings, shards: Iterable[str]
) -> Iterator[tuple[CommitRecord, int]]:
    for shard in shards:
        path = commit_path(shard)
        try:
            data = read_record_file(storage, path)
        except FileNotFoundError:  # removed meanwhile
            continue
        record = parse_commit(
            data, settings, shard, location=f"{storage.location}/{path}", store=storage.location
        )
        yield record, int(crc32c_digits(data), 16)


def _duplicate_key_error(storage: Storage, error: DuplicateKey) -> CorruptRecord:
    return CorruptRecord(
        f"{error} of {storage.location}; keys must be unique, so rename one of the two in the "
        "dataset",
        remedy="repair",
        subject=storage.location,
    )
