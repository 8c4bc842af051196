"""All clips of a store in packed columns, sorted by key: where each lies, its size and checksum.

Commit records are what a store consists of, and this is derived from them. `index.npz` keeps it,
so that a million clips open in a second or two, and so that a store can be read from where folders
cannot be listed. Used by the reader, written by the writer and by the upkeep of stores.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from cache_schema.atomic_io import FileLock, naming, open_for_writing, sync
from cache_schema.errors import CorruptRecord
from cache_schema.index_checks import check_columns
from cache_schema.index_file import (
    STORE_CRC32C,
    DamagedIndex,
    column_types,
    read_columns,
    write_columns,
)
from cache_schema.index_rows import DuplicateKey, columns_of_records, merged_columns
from cache_schema.names import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    STORE_FILE,
    StoreLayout,
)
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.records import (
    CommitRecord,
    SkippedClip,
    committed_shards,
    mend_hint,
    parse_commit,
    read_record_file,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import UNREADABLE, LocalPlace, Place
from cache_schema.zarr_shard import FileFacts

_HEAD_BYTES = 22
"""Of a sealed file: as much as ends with its own checksum."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What is known of a finished shard without reading its record."""

    name: str
    source: str
    """The input it was made from, such as the name of a tar."""
    generation: int
    """How often its record was replaced."""
    group: int
    """The generation that the folder of its group was made for."""
    num_clips: int
    num_bytes: int
    """Of its clips on disk, without metadata."""


class ClipIndex:
    """The columns of `index.npz`; a row is a clip, and rows are in ascending order of keys."""

    def __init__(self, columns: Mapping[str, np.ndarray], arrays: Iterable[str]) -> None:
        """Take the columns that `index_file` lists for these arrays of a store.

        Raises `ValueError` where they do not fit each other.
        """
        self.arrays = tuple(arrays)
        self.columns = {name: columns[name] for name in column_types(self.arrays)}
        self.store_crc32c: int | None = None
        """The checksum that `store.json` opened with when this index was written; None where it is
        not the one on disk."""
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
        """The index of a store with these commit records, each with the checksum it opens with.

        Raises `DuplicateKey` if two clips have one key.
        """
        names = tuple(arrays)
        return cls(columns_of_records(records, names), names)

    def with_shards(self, newer: "ClipIndex") -> "ClipIndex":
        """This index with the shards of another, in place of those of their names.

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
        """The finished shards by name, sorted."""
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

    def place_of(self, row: int) -> tuple[str, int, int]:
        """Name of a clip's shard, generation of the shard's group, and the clip's index there."""
        shard = int(self.columns["clips.shard"][row])
        group = int(self.columns["shards.group"][shard])
        return self.shard_names[shard], group, int(self.columns["clips.index"][row])

    def file_of(self, row: int, array: str) -> FileFacts:
        """What is recorded of a clip's file of an array."""
        columns = (self.columns[f"arrays.{array}.{name}"] for name in FileFacts._fields)
        return FileFacts(*(int(column[row]) for column in columns))

    def record_crc32c(self, shard: str) -> int:
        """The checksum that a shard's commit record opens with."""
        return int(self.columns["shards.crc32c"][self.shard_names.index(shard)])

    def skipped_elsewhere(self) -> set[str]:
        """Keys that are skipped several times, or skipped and held."""
        ends = self.columns["skipped.key.ends"]
        keys = sorted(PackedText(self.columns["skipped.key.text"], ends))
        found = {key for key, following in pairwise(keys) if key == following}
        if len(self.keys):
            unique = SortedText.from_strings(key for key, _ in groupby(keys))
            held = np.flatnonzero(self.keys.rows_of(unique) >= 0)
            found.update(unique[int(row)] for row in held)
        return found

    def all_skipped(self) -> Iterator[SkippedClip]:
        """What the commit records say of skipped clips, shard by shard."""
        texts = (
            PackedText(self.columns[f"skipped.{name}.text"], self.columns[f"skipped.{name}.ends"])
            for name in ("key", "reason", "detail")
        )
        names = list(self.shard_names)
        # Not as lists, which would hold an object for each of a million.
        fingerprints = map(bytes, self.columns["skipped.fingerprint"])
        shards = self.columns["skipped.shard"].data
        for key, reason, detail, fingerprint, shard in zip(
            *texts, fingerprints, shards, strict=True
        ):
            yield SkippedClip(key, reason, detail, fingerprint.decode("ascii"), names[shard])


def read_index(place: Place, settings: StoreSettings) -> ClipIndex:
    """`index.npz` as it is; `DamagedIndex`, or `FileNotFoundError` where there is none."""
    local = place.folder / INDEX_FILE if isinstance(place, LocalPlace) else None
    try:
        return parse_index(local or place.read(INDEX_FILE, MAX_INDEX_BYTES), settings)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise DamagedIndex(f"it cannot be read ({error.strerror})") from error


def parse_index(source: bytes | Path, settings: StoreSettings) -> ClipIndex:
    """The index in an archive, checked as if a stranger had written it; raises `DamagedIndex`."""
    columns = read_columns(source, settings)
    try:
        index = ClipIndex(columns, settings.arrays)
        check_columns(columns, settings)
        (index.store_crc32c,) = columns[STORE_CRC32C].tolist()
    except ValueError as error:
        raise DamagedIndex(f"it contradicts itself ({error})") from error
    return index


def load_index(place: Place, settings: StoreSettings) -> ClipIndex:
    """The clips of a store as of now.

    In a local folder commit records decide: what `index.npz` does not have of them, or has of an
    older generation, is read from them, and without the file all of it is. Elsewhere `index.npz`
    decides.

    Raises:
        CorruptRecord: a commit record is damaged, contradicts another, or is lost: `index.npz`
            lists it and it is not there; elsewhere, the index is damaged.
        StoreUnreachable: a network place did not answer.
    """
    if isinstance(place, LocalPlace):
        return _current_index(place, settings)
    again = "run sam2vx-pipeline cache copy to this address again"
    try:
        return read_index(place, settings)
    except FileNotFoundError:
        raise CorruptRecord(
            f"{place.where} has no {INDEX_FILE}, without which a store can be read from a local "
            f"folder only; {again}"
        ) from None
    except DamagedIndex as error:
        raise CorruptRecord(f"{place.where}/{INDEX_FILE} is damaged: {error}; {again}") from error


def write_index(
    layout: StoreLayout, settings: StoreSettings, lock: FileLock, known: ClipIndex | None = None
) -> ClipIndex:
    """Bring `index.npz` up to date with the commit records; what it holds then.

    `known` is what the caller knows of them; what it lacks is read, and without it what
    `index.npz` lacks.

    Raises:
        CorruptRecord: a commit record is damaged or lost, or two shards hold one key.
        LockLost: `lock`, the store's, is not held any more.
    """
    place = LocalPlace(layout.root)
    index = _current_index(place, settings, known)
    store_crc32c = sealed_crc32c(place, STORE_FILE)
    if index.store_crc32c == store_crc32c:
        return index
    layout.staging.mkdir(exist_ok=True)
    temporary = layout.staging / f".{INDEX_FILE}"
    temporary.unlink(missing_ok=True)  # a writer that lost the lock may still have it open
    with naming(layout.index), open_for_writing(temporary) as file:
        write_columns(file, index.columns, settings, store_crc32c)
        file.flush()
        os.fsync(file.fileno())
    lock.check()
    temporary.rename(layout.index)
    sync(layout.root)
    return index


def is_indexed(layout: StoreLayout, settings: StoreSettings) -> bool:
    """Whether `index.npz` is whole and lists the commit records as they are; parses none."""
    place = LocalPlace(layout.root)
    try:
        index = read_index(place, settings)
    except (FileNotFoundError, DamagedIndex):
        return False
    listed = set(index.shard_names)
    return (
        index.store_crc32c == sealed_crc32c(place, STORE_FILE)
        and listed == set(committed_shards(layout))
        and listed == _same_records(place, index)
    )


def index_of_records(place: Place, settings: StoreSettings, shards: Iterable[str]) -> ClipIndex:
    """The index as the commit records of these shards give it, whatever `index.npz` says.

    Raises `CorruptRecord`.
    """
    try:
        return ClipIndex.from_records(_read_records(place, settings, shards), settings.arrays)
    except DuplicateKey as error:
        raise _duplicate(place, error) from error


def record_head(place: Place, shard: str) -> bytes:
    """The checksum a commit record opens with, in hexadecimal digits as a rule."""
    return place.read_range(commit_path(shard), 0, _HEAD_BYTES)[-8:]


def sealed_crc32c(place: Place, path: str) -> int:
    """The checksum that a sealed file, which is in order, opens with."""
    return int(place.read_range(path, 0, _HEAD_BYTES)[-8:], 16)


def commit_path(shard: str) -> str:
    """The record that makes a shard visible to readers, relative to the store."""
    return f"commits/{shard}.json"


def _current_index(
    place: LocalPlace, settings: StoreSettings, known: ClipIndex | None = None
) -> ClipIndex:
    # The index before the records: what it lists has been committed when they are looked for.
    index = known
    if index is None:
        with suppress(FileNotFoundError, DamagedIndex):
            index = read_index(place, settings)
    shards = committed_shards(StoreLayout(place.folder))
    if index is None:
        return index_of_records(place, settings, shards)
    kept = _same_records(place, index)
    changed = [shard for shard in shards if shard not in kept]
    if not changed and len(kept) == len(index.shard_names):
        return index
    newer = index_of_records(place, settings, changed)
    _refuse_lost_records(place, index, newer, kept)
    try:
        return index.with_shards(newer)
    except DuplicateKey as error:
        raise _duplicate(place, error) from error


def _refuse_lost_records(
    place: Place, index: ClipIndex, newer: ClipIndex, kept: Collection[str]
) -> None:
    """`CorruptRecord` where the index knows of a record that is not there any more."""
    for shard, known in index.shards.items():
        if shard in kept:
            continue
        found = newer.shards.get(shard)
        if found is None or found.generation <= known.generation:
            raise CorruptRecord(
                f"{place.where}/{commit_path(shard)} {lost_record(known, found)}; "
                f"{mend_hint(place.where)}"
            )


def lost_record(known: ShardFacts, found: ShardFacts | None) -> str:
    """What is wrong with a shard whose commit record is not the one that the index lists.

    `found` is of an older generation than `known`, or of the same; None where there is none. A
    newer one is in order: the index is written after the records.
    """
    if found is None:
        return f"cannot be found, and {INDEX_FILE} lists {known.num_clips} clips of it"
    if found.generation < known.generation:
        return (
            f"is of generation {found.generation}, and {INDEX_FILE} lists generation "
            f"{known.generation}: an older state was put back"
        )
    return f"is not the one that {INDEX_FILE} lists: it was changed, or another was put there"


def _same_records(place: LocalPlace, index: ClipIndex) -> set[str]:
    """The shards of an index whose commit records are those that it lists."""
    crc32cs = index.columns["shards.crc32c"].tolist()
    same = set()
    for shard, crc32c in zip(index.shard_names, crc32cs, strict=True):
        with suppress(OSError):  # whatever it is, it is read once more as a whole
            if record_head(place, shard) == b"%08x" % crc32c:
                same.add(shard)
    return same


def _read_records(
    place: Place, settings: StoreSettings, shards: Iterable[str]
) -> Iterator[tuple[CommitRecord, int]]:
    for shard in shards:
        path = commit_path(shard)
        try:
            data = read_record_file(place, path)
        except FileNotFoundError:  # taken out just now
            continue
        record = parse_commit(
            data, settings, shard, where=f"{place.where}/{path}", store=place.where
        )
        yield record, int(data[_HEAD_BYTES - 8 : _HEAD_BYTES], 16)


def _duplicate(place: Place, error: DuplicateKey) -> CorruptRecord:
    return CorruptRecord(
        f"{error} of {place.where}; keys must be unique, so rename one of the two in the dataset, "
        f"and {mend_hint(place.where)}"
    )
