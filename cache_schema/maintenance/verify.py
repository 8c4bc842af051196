"""Verifying a whole store against its commit records.

Nothing is changed. The store may be written to meanwhile: a shard whose record was replaced is
checked again, and leftovers of a process that still holds the shard's lock are not damage.
"""

import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cache_schema.atomic_io import is_locked
from cache_schema.attribute_table import AttributeTable, read_attributes
from cache_schema.errors import CorruptRecord, Remedy, StoreNotFound, UnknownSchemaVersion
from cache_schema.index import (
    ClipIndex,
    describe_lost_record,
    parse_index,
    read_crc32c,
)
from cache_schema.index_building import DuplicateKey, columns_of_records
from cache_schema.index_columns import Columns, DamagedIndex, write_columns
from cache_schema.maintenance.check_shard import (
    Damage,
    check_shard,
    compression_mismatch,
    is_intact_other_version,
    read_file,
    read_record,
)
from cache_schema.names import (
    ATTRIBUTES_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    STORE_FILE,
    StoreLayout,
    group_name,
    is_shard_name,
    parse_group_name,
    printable,
)
from cache_schema.records import CommitRecord, OtherSettings, parse_manifest
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalStorage, Storage, open_storage

_MAX_CHECKS = 100
"""Maximum number of times a shard is checked that is being replaced meanwhile."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a store."""

    shard: str | None
    """The shard, if the problem concerns one."""
    key: str | None
    """The clip, if the problem concerns one."""
    what: str
    remedy: Remedy


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of `verify_store`."""

    problems: tuple[Problem, ...]
    num_clips: int
    """Committed clips, including damaged ones."""
    num_bytes: int
    """Recorded size of their files."""


def verify_store(
    store: Path | str, *, fast: bool = False, advance: Callable[[int], None] | None = None
) -> VerifyReport:
    """Compare every file of every committed shard with its commit record, and the index with both.

    Args:
        store: the store's folder or URL. If folders cannot be listed, the index gives the shards.
            Unrecorded files are looked for in local folders only.
        fast: compare listings and sizes only, without reading the clips.
        advance: called with the number of bytes done, out of `VerifyReport.num_bytes` plus
            metadata.

    Raises:
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from `store.json`. All other problems
            are in the report.
        StoreUnreachable, OSError: files that may be intact cannot be read.
    """
    storage = open_storage(store)
    survey = Survey(storage, read_settings(storage), fast, advance or (lambda _: None))
    survey.run()
    return VerifyReport(tuple(survey.problems), survey.num_clips, survey.num_bytes)


def read_settings(storage: Storage) -> StoreSettings:
    """Settings from `store.json`, which must be intact."""
    location = f"{storage.location}/{STORE_FILE}"
    try:
        data = read_file(storage, STORE_FILE)
    except FileNotFoundError:
        raise StoreNotFound(
            f"{storage.location} is not a feature store: it has no {STORE_FILE}"
        ) from None
    if data is None:
        raise CorruptRecord(f"{location} cannot be read")
    try:
        return parse_manifest(data, location=location, store=storage.location).settings
    except UnknownSchemaVersion as error:
        if is_intact_other_version(data):
            raise
        raise CorruptRecord(f"{location} is damaged ({error})") from error


@dataclass
class Survey:
    """One verification of a store, with the additional results that a repair needs."""

    storage: Storage
    settings: StoreSettings
    fast: bool
    advance: Callable[[int], None]
    problems: list[Problem] = field(default_factory=list)
    num_clips: int = 0
    num_bytes: int = 0
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    """The shards of every key that is in more than one."""
    index_is_damaged: bool = False
    """Whether the index is damaged or contradicts the records."""
    index: ClipIndex | None = None
    """The index as found; None if it is missing or damaged."""
    attributes_are_damaged: bool = False
    """Whether `attributes.npz` is damaged or contradicts the records."""
    lost: set[str] = field(default_factory=set)
    """Shards whose commit record is lost: listed in the index, or with a folder that no writer
    left."""
    conflicting: set[str] = field(default_factory=set)
    """Shards whose commit record contradicts the index; which of the two is right is unknown."""
    crc32cs: dict[str, int] = field(default_factory=dict)
    """The `crc32c` of each valid commit record, by shard."""
    has_foreign_settings: bool = False
    """Whether `store.json` belongs to another store than all records."""
    _other_settings: set[str] = field(default_factory=set)
    """Shards whose record is intact, but belongs to a store with other settings."""
    _shard_of_key: dict[str, str] = field(default_factory=dict)
    _generations: dict[str, int | None] = field(default_factory=dict)
    """Generations of the committed shards; None if the record is unusable."""
    _groups: dict[str, int] = field(default_factory=dict)
    """Generations of the groups of shards with valid records."""
    _index_bytes: bytes | None = None
    _attributes: AttributeTable | None = None

    def run(self) -> None:
        """Verify the store and fill in all fields."""
        self.index = index = self._read_index()
        self._attributes = self._read_attributes()
        # List groups before records, so that the record of every listed group is already written.
        is_local = isinstance(self.storage, LocalStorage)
        groups = self.storage.list_folder("shards") if is_local else None
        rebuilt = self._check_shards(self._committed_shards(index))
        if self._other_settings and not self.crc32cs:
            self.has_foreign_settings = True
            self.problems = []
            self._report(
                f"{STORE_FILE} is that of a store with other settings than the commit records, "
                f"such as commits/{min(self._other_settings)}.json"
            )
            return
        if index is not None:
            self._check_index(index, rebuilt)
        if isinstance(self.storage, LocalStorage):
            self._check_group_folders(StoreLayout(self.storage.folder), groups or [])

    def _report(
        self,
        what: str,
        *,
        shard: str | None = None,
        key: str | None = None,
        remedy: Remedy = "repair",
    ) -> None:
        if remedy == "repair" and not isinstance(self.storage, LocalStorage):
            remedy = "copy"
        self.problems.append(Problem(shard, key, what, remedy))

    def _read_index(self) -> ClipIndex | None:
        try:
            self._index_bytes = read_file(self.storage, INDEX_FILE, MAX_INDEX_BYTES)
        except FileNotFoundError:
            if not isinstance(self.storage, LocalStorage):
                self._report(f"{INDEX_FILE} cannot be found; nothing can be read without it")
            return None
        try:
            if self._index_bytes is None:
                raise ValueError("the disk cannot read it")
            return parse_index(self._index_bytes, self.settings)
        except ValueError as error:
            self._report_index(f"is damaged: {error}")
            return None

    def _read_attributes(self) -> AttributeTable | None:
        try:
            return read_attributes(self.storage, self.settings)
        except FileNotFoundError:
            return None
        except DamagedIndex as error:
            self._report_attributes(f"is damaged: {error}")
            return None

    def _report_attributes(self, what: str) -> None:
        self.attributes_are_damaged = True
        self._report(f"{ATTRIBUTES_FILE} {what}")

    def _committed_shards(self, index: ClipIndex | None) -> list[str]:
        names = self.storage.list_folder("commits")
        if names is None:
            return [] if index is None else list(index.shard_names)
        shards = []
        for name in names:
            shard = name.removesuffix(".json")
            if name.endswith(".json") and is_shard_name(shard):
                shards.append(shard)
            else:
                self._report(f"commits/{printable(name)} is not a commit record")
        return sorted(shards)  # as file names, '00000-retry1.json' sorts before '00000.json'

    def _check_shards(self, shards: Iterable[str]) -> Columns | None:
        """Check the shards, and return the index's columns as their records give them.

        None with `fast`, without an index to compare with, or if a key is in two shards.
        """
        records = (checked for shard in shards if (checked := self._check_shard(shard)))
        if self.fast or self.index is None:
            for _ in records:
                pass
            return None
        try:
            return columns_of_records(records, self.settings.arrays)
        except DuplicateKey:
            return None  # reported with the shards, unless the key moved meanwhile

    def _check_shard(self, shard: str) -> tuple[CommitRecord, int] | None:
        """Check one shard; returns its record with the `crc32c`, or None if it is unusable."""
        try:
            record, crc32c, damage = self._check_until_stable(shard)
        except FileNotFoundError:
            return None  # it was removed since it was listed, or only the index lists it
        except UnknownSchemaVersion as error:
            self._generations[shard] = None
            self._report(str(error), shard=shard, remedy="by hand")
            return None
        except CorruptRecord as error:
            self._generations[shard] = None
            self._report(str(error), shard=shard)
            if isinstance(error, OtherSettings):
                self._other_settings.add(shard)
            return None
        self.crc32cs[shard] = crc32c
        self._generations[shard], self._groups[shard] = record.generation, record.group
        self.num_clips += len(record.clips)
        self.num_bytes += sum(
            stored.bytes for clip in record.clips for stored in clip.arrays.values()
        )
        if damage and (what := compression_mismatch(self.storage, self.settings, record)):
            self._report(what, shard=shard, remedy="by hand")
            return record, crc32c
        for what in damage.metadata:
            self._report(what, shard=shard)
        for key, what in damage.clips.items():
            self._report(what, shard=shard, key=key)
        self._check_duplicates(record)
        table = None if self.fast else self._attributes
        if table is not None and not table.agrees_with(record, crc32c):
            self._report_attributes(f"does not agree with commits/{shard}.json")
        group = group_name(shard, record.group)
        for path in damage.foreign:
            what = f"file {printable(path)} does not belong to the shard"
            self._report_leftover(f"{group}/{path}", what, shard)
        return record, crc32c

    def _check_duplicates(self, record: CommitRecord) -> None:
        held: dict[str, set[str]] = {}
        for clip in record.clips:
            other = self._shard_of_key.setdefault(clip.key, record.shard)
            if other == record.shard:
                continue
            if other not in held:
                held[other] = self._current_keys(other)
            if clip.key in held[other]:
                self.duplicates.setdefault(clip.key, [other]).append(record.shard)
                what = f"the key is in shard {other!r} too"
                self._report(what, shard=record.shard, key=clip.key)
            else:
                self._shard_of_key[clip.key] = record.shard

    def _current_keys(self, shard: str) -> set[str]:
        """Keys that a shard checked earlier holds now: a key may have moved to a retry."""
        try:
            record, _ = read_record(self.storage, self.settings, shard)
        except (CorruptRecord, UnknownSchemaVersion, FileNotFoundError):
            return set()
        return {clip.key for clip in record.clips}

    def _current_group(self, shard: str) -> int:
        """Current generation of a shard's group, which may have been replaced meanwhile."""
        try:
            return read_record(self.storage, self.settings, shard)[0].group
        except (CorruptRecord, UnknownSchemaVersion, FileNotFoundError):
            return self._groups[shard]

    def _report_leftover(self, path: str, what: str, shard: str) -> None:
        """Report an unrecorded path below `shards`; harmless while the shard's lock is held."""
        assert isinstance(self.storage, LocalStorage), "only local folders are listed"
        layout = StoreLayout(self.storage.folder)
        remedy: Remedy = "extract" if is_locked(layout.lock(shard)) else "repair"
        if os.path.lexists(layout.shards / path):  # it was not removed meanwhile
            self._report(what, shard=shard, remedy=remedy)

    def _check_until_stable(self, shard: str) -> tuple[CommitRecord, int, Damage]:
        """Record, its `crc32c`, and damage of a shard; checked again if replaced meanwhile."""
        record, crc32c = read_record(self.storage, self.settings, shard)
        for _ in range(_MAX_CHECKS):
            damage = check_shard(
                self.storage, self.settings, record, fast=self.fast, advance=self.advance
            )
            before = crc32c
            if damage:
                record, crc32c = read_record(self.storage, self.settings, shard)
            if crc32c == before:
                break
        return record, crc32c, damage

    def _check_index(self, index: ClipIndex, rebuilt: Columns | None) -> None:
        """Check that the index is, bit for bit, the one that the records give."""
        crc32cs = index.columns["shards.crc32c"].tolist()
        indexed = dict(zip(index.shard_names, crc32cs, strict=True))
        unusable = {shard for shard, found in self._generations.items() if found is None}
        changed = {name for name, _ in indexed.items() ^ self.crc32cs.items()} - unusable
        for shard in sorted(changed & indexed.keys()):
            known, found = index.shards[shard], self._generations.get(shard)
            if found is not None and found > known.generation:
                continue
            record = None if found is None else replace(known, generation=found)
            self._report(f"commits/{shard}.json {describe_lost_record(known, record)}", shard=shard)
            self.index_is_damaged = True
            changed.remove(shard)
            (self.lost if record is None else self.conflicting).add(shard)
        if index.store_crc32c != read_crc32c(self.storage, STORE_FILE):
            self.index_is_damaged = True
            self._report(
                f"{STORE_FILE} is not the one that {INDEX_FILE} was written with: it was changed "
                "or replaced"
            )
        if changed:
            self._report(
                f"{INDEX_FILE} is not up to date with {len(changed)} shards, such as "
                f"{min(changed)!r}",
                remedy="extract" if isinstance(self.storage, LocalStorage) else "copy",
            )
        elif rebuilt is not None and not (unusable or self.duplicates or self.index_is_damaged):
            data = io.BytesIO()
            write_columns(data, rebuilt, self.settings, read_crc32c(self.storage, STORE_FILE))
            if data.getvalue() != self._index_bytes:
                self._report_index("does not agree with the commit records")

    def _report_index(self, what: str) -> None:
        self.index_is_damaged = True
        self._report(f"{INDEX_FILE} {what}")

    def _check_uncommitted_group(self, layout: StoreLayout, shard: str) -> None:
        """Check a group without commit record: left by a current or killed writer, or damage."""
        if shard in self.lost:
            return
        if layout.staged(shard).exists():
            self._report(f"shards/{shard} has no commit record", shard=shard, remedy="extract")
        elif not layout.commit(shard).exists() and layout.group(shard, 0).exists():
            # It was neither committed nor removed meanwhile.
            self.lost.add(shard)
            self._report(
                f"shards/{shard} has no commit record and no staged clips: the record is lost",
                shard=shard,
            )

    def _check_group_folders(self, layout: StoreLayout, groups: list[str]) -> None:
        for name in groups:
            group = parse_group_name(name)
            if group is None:
                self._report(f"shards/{printable(name)} is not a shard's folder")
                continue
            shard, generation = group
            if shard not in self._generations and generation == 0:
                self._check_uncommitted_group(layout, shard)
            elif shard not in self._generations:
                what = f"shards/{name} is left over, without a commit record"
                self._report_leftover(name, what, shard)
            elif self._groups.get(shard, generation) != generation and (
                (current := self._current_group(shard)) != generation
            ):
                location = f"shards/{group_name(shard, current)}"
                what = f"shards/{name} is left over: the shard's group is {location}"
                self._report_leftover(name, what, shard)
