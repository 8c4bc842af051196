"""Checking a whole store against its commit records; used by `repair` and the console.

Nothing is changed. A store may be written to meanwhile: a shard whose record was replaced is looked
at again, and what a process that holds the shard's lock has not removed yet is no damage.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cache_schema.atomic_io import is_locked
from cache_schema.clip_index import (
    ClipIndex,
    index_of_records,
    lost_record,
    parse_index,
    sealed_crc32c,
)
from cache_schema.errors import CorruptRecord, StoreNotFound, UnknownSchemaVersion
from cache_schema.index_file import write_columns
from cache_schema.maintenance.check_shard import (
    Damage,
    check_shard,
    contradiction,
    is_intact_of_its_version,
    read_file,
    read_record,
)
from cache_schema.names import (
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
from cache_schema.storage import LocalPlace, Place, open_place

Mend = Literal["repair", "extract", "copy", "by hand"]

MENDS: dict[Mend, str] = {
    "repair": "run sam2vx-pipeline cache repair, then extract-features --retry-failed",
    "extract": "harmless: readers ignore it, and extract-features finishes or removes it",
    "copy": "run sam2vx-pipeline cache copy again from the store it was copied from",
    "by hand": "nothing mends it by itself",
}
"""What to do about a problem."""

_LOOKS = 100
"""How often a shard is looked at that others replace meanwhile."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    shard: str | None
    """The shard, where it is one shard's problem."""
    key: str | None
    """The clip, where it is one clip's problem."""
    what: str
    mend: Mend


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_store` found."""

    problems: tuple[Problem, ...]
    num_clips: int
    """Committed clips, damaged ones included."""
    num_bytes: int
    """Bytes of their files, as recorded."""


def verify_store(
    store: Path | str, *, fast: bool = False, advance: Callable[[int], None] | None = None
) -> VerifyReport:
    """Compare every file of every committed shard with its commit record, and the index with both.

    Args:
        store: the store's folder or URL. Where folders cannot be listed, the index says which
            shards there are; what is there beside them is looked for in local folders only.
        fast: compare listings and sizes only, and do not read the clips.
        advance: called with the bytes done, of `VerifyReport.num_bytes` and the metadata's.

    Raises:
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from `store.json`. Everything else that
            is wrong is in the report.
        StoreUnreachable, OSError: files that may be in order cannot be read.
    """
    place = open_place(store)
    survey = Survey(place, read_settings(place), fast, advance or (lambda _: None))
    survey.look()
    return VerifyReport(tuple(survey.problems), survey.num_clips, survey.num_bytes)


def read_settings(place: Place) -> StoreSettings:
    """From `store.json`, which must be in order."""
    where = f"{place.where}/{STORE_FILE}"
    try:
        data = read_file(place, STORE_FILE)
    except FileNotFoundError:
        raise StoreNotFound(
            f"{place.where} is not a feature store: it has no {STORE_FILE}"
        ) from None
    if data is None:
        raise CorruptRecord(f"{where} cannot be read")
    try:
        return parse_manifest(data, where=where, store=place.where).settings
    except UnknownSchemaVersion as error:
        if is_intact_of_its_version(data):
            raise
        raise CorruptRecord(f"{where} is damaged ({error})") from error


@dataclass
class Survey:
    """One look at a store, with what `repair` needs besides the report."""

    place: Place
    settings: StoreSettings
    fast: bool
    advance: Callable[[int], None]
    problems: list[Problem] = field(default_factory=list)
    num_clips: int = 0
    num_bytes: int = 0
    twins: dict[str, list[str]] = field(default_factory=dict)
    """The shards of every key that is in several."""
    index_is_damaged: bool = False
    """Or contradicts the records."""
    index: ClipIndex | None = None
    """As it was found; None where there is none, or it is damaged."""
    lost: set[str] = field(default_factory=set)
    """Shards whose commit record is gone, by the index or by a folder that no writer left."""
    contradicted: set[str] = field(default_factory=set)
    """Shards of whose commit record the index says otherwise: which of the two is true nobody
    knows."""
    crc32cs: dict[str, int] = field(default_factory=dict)
    """That the usable records open with, by shard."""
    settings_are_foreign: bool = False
    """Whether `store.json` is that of another store than all records."""
    _other_settings: set[str] = field(default_factory=set)
    """Shards whose record is sealed, and belongs to a store with other settings."""
    _shard_of_key: dict[str, str] = field(default_factory=dict)
    _generations: dict[str, int | None] = field(default_factory=dict)
    """Of the committed shards; None where the record is of no use."""
    _groups: dict[str, int] = field(default_factory=dict)
    """The generations of the usable shards' groups."""
    _index_bytes: bytes | None = None

    def look(self) -> None:
        """Fill in everything."""
        self.index = index = self._read_index()
        # Before the records: a group that is published now has its record by the time it is read.
        is_local = isinstance(self.place, LocalPlace)
        groups = self.place.list_folder("shards") if is_local else None
        for shard in self._committed_shards(index):
            self._look_at_shard(shard)
        if self._other_settings and not self.crc32cs:
            self.settings_are_foreign = True
            self.problems = []
            self._report(
                f"{STORE_FILE} is that of a store with other settings than the commit records, "
                f"such as commits/{min(self._other_settings)}.json"
            )
            return
        if index is not None:
            self._look_at_index(index)
        if isinstance(self.place, LocalPlace):
            self._look_beside_shards(StoreLayout(self.place.folder), groups or [])

    def _report(
        self, what: str, *, shard: str | None = None, key: str | None = None, mend: Mend = "repair"
    ) -> None:
        if mend == "repair" and not isinstance(self.place, LocalPlace):
            mend = "copy"
        self.problems.append(Problem(shard, key, what, mend))

    def _read_index(self) -> ClipIndex | None:
        try:
            self._index_bytes = read_file(self.place, INDEX_FILE, MAX_INDEX_BYTES)
        except FileNotFoundError:
            if not isinstance(self.place, LocalPlace):
                self._report(f"{INDEX_FILE} cannot be found; nothing can be read without it")
            return None
        try:
            if self._index_bytes is None:
                raise ValueError("the disk cannot give it back")
            return parse_index(self._index_bytes, self.settings)
        except ValueError as error:
            self._report_index(f"is damaged: {error}")
            return None

    def _committed_shards(self, index: ClipIndex | None) -> list[str]:
        names = self.place.list_folder("commits")
        if names is None:
            return [] if index is None else list(index.shard_names)
        shards = []
        for name in names:
            shard = name.removesuffix(".json")
            if name.endswith(".json") and is_shard_name(shard):
                shards.append(shard)
            else:
                self._report(f"commits/{printable(name)} is not a commit record")
        return sorted(shards)  # of files, '00000-retry1.json' is before '00000.json'

    def _look_at_shard(self, shard: str) -> None:
        try:
            seen = self._settled(shard)
        except FileNotFoundError:
            return  # it has been taken out since it was listed, or the index alone lists it
        except UnknownSchemaVersion as error:
            self._generations[shard] = None
            self._report(str(error), shard=shard, mend="by hand")
            return
        except CorruptRecord as error:
            self._generations[shard] = None
            self._report(str(error), shard=shard)
            if isinstance(error, OtherSettings):
                self._other_settings.add(shard)
            return
        record, self.crc32cs[shard], damage = seen
        self._generations[shard], self._groups[shard] = record.generation, record.group
        self.num_clips += len(record.clips)
        self.num_bytes += sum(
            stored.bytes for clip in record.clips for stored in clip.arrays.values()
        )
        if damage and (what := contradiction(self.place, self.settings, record)):
            self._report(what, shard=shard, mend="by hand")
            return
        for what in damage.metadata:
            self._report(what, shard=shard)
        for key, what in damage.clips.items():
            self._report(what, shard=shard, key=key)
        self._look_for_twins(record)
        group = group_name(shard, record.group)
        for path in damage.foreign:
            what = f"file {printable(path)} does not belong to the shard"
            self._report_leftover(f"{group}/{path}", what, shard)

    def _look_for_twins(self, record: CommitRecord) -> None:
        held: dict[str, set[str]] = {}
        for clip in record.clips:
            other = self._shard_of_key.setdefault(clip.key, record.shard)
            if other == record.shard:
                continue
            if other not in held:
                held[other] = self._keys_now(other)
            if clip.key in held[other]:
                self.twins.setdefault(clip.key, [other]).append(record.shard)
                what = f"the key is in shard {other!r} too"
                self._report(what, shard=record.shard, key=clip.key)
            else:
                self._shard_of_key[clip.key] = record.shard

    def _keys_now(self, shard: str) -> set[str]:
        """The clips of a shard that was looked at before: a key may have moved to a retry."""
        try:
            record, _ = read_record(self.place, self.settings, shard)
        except (CorruptRecord, UnknownSchemaVersion, FileNotFoundError):
            return set()
        return {clip.key for clip in record.clips}

    def _group_now(self, shard: str) -> int:
        """The generation of a shard's group; it may have been replaced since it was looked at."""
        try:
            return read_record(self.place, self.settings, shard)[0].group
        except (CorruptRecord, UnknownSchemaVersion, FileNotFoundError):
            return self._groups[shard]

    def _report_leftover(self, path: str, what: str, shard: str) -> None:
        """What no record names below `shards`; a process that is at the shard will remove it."""
        assert isinstance(self.place, LocalPlace), "elsewhere nothing is listed"
        layout = StoreLayout(self.place.folder)
        mend: Mend = "extract" if is_locked(layout.lock(shard)) else "repair"
        if os.path.lexists(layout.shards / path):  # and was not removed just now
            self._report(what, shard=shard, mend=mend)

    def _settled(self, shard: str) -> tuple[CommitRecord, int, Damage]:
        """Record, its checksum, and damage of a shard that was not replaced meanwhile."""
        record, crc32c = read_record(self.place, self.settings, shard)
        for _ in range(_LOOKS):
            damage = check_shard(
                self.place, self.settings, record, fast=self.fast, advance=self.advance
            )
            before = crc32c
            if damage:
                record, crc32c = read_record(self.place, self.settings, shard)
            if crc32c == before:
                break
        return record, crc32c, damage

    def _look_at_index(self, index: ClipIndex) -> None:
        """Whether the index is, bit for bit, the one that the records give."""
        crc32cs = index.columns["shards.crc32c"].tolist()
        indexed = dict(zip(index.shard_names, crc32cs, strict=True))
        unusable = {shard for shard, found in self._generations.items() if found is None}
        changed = {name for name, _ in indexed.items() ^ self.crc32cs.items()} - unusable
        for shard in sorted(changed & indexed.keys()):
            known, found = index.shards[shard], self._generations.get(shard)
            if found is not None and found > known.generation:
                continue
            record = None if found is None else replace(known, generation=found)
            self._report(f"commits/{shard}.json {lost_record(known, record)}", shard=shard)
            self.index_is_damaged = True
            changed.remove(shard)
            (self.lost if record is None else self.contradicted).add(shard)
        if index.store_crc32c != sealed_crc32c(self.place, STORE_FILE):
            self.index_is_damaged = True
            self._report(
                f"{STORE_FILE} is not the one that {INDEX_FILE} was written with: it was changed, "
                "or another was put there"
            )
        if changed:
            self._report(
                f"{INDEX_FILE} is not up to date with {len(changed)} shards, such as "
                f"{min(changed)!r}",
                mend="extract" if isinstance(self.place, LocalPlace) else "copy",
            )
        elif self.fast or unusable or self.twins or self.index_is_damaged:
            return  # it cannot be made from the records to compare
        else:
            self._compare_index()

    def _compare_index(self) -> None:
        shards = sorted(self.crc32cs)
        rebuilt = index_of_records(self.place, self.settings, shards)
        crc32cs = dict(
            zip(rebuilt.shard_names, rebuilt.columns["shards.crc32c"].tolist(), strict=True)
        )
        if crc32cs != self.crc32cs:
            return  # records are being replaced
        data = io.BytesIO()
        write_columns(data, rebuilt.columns, self.settings, sealed_crc32c(self.place, STORE_FILE))
        if data.getvalue() != self._index_bytes:
            self._report_index("does not agree with the commit records")

    def _report_index(self, what: str) -> None:
        self.index_is_damaged = True
        self._report(f"{INDEX_FILE} {what}")

    def _look_at_unrecorded(self, layout: StoreLayout, shard: str) -> None:
        """A group without a commit record: of a writer that is at it or was killed, or damage."""
        if shard in self.lost:
            return
        if layout.staged(shard).exists():
            self._report(f"shards/{shard} has no commit record", shard=shard, mend="extract")
        elif not layout.commit(shard).exists() and layout.group(shard, 0).exists():
            # And it was neither committed nor taken out just now.
            self.lost.add(shard)
            self._report(
                f"shards/{shard} has no commit record, and no writer left it so: the record is "
                "lost",
                shard=shard,
            )

    def _look_beside_shards(self, layout: StoreLayout, groups: list[str]) -> None:
        for name in groups:
            group = parse_group_name(name)
            if group is None:
                self._report(f"shards/{printable(name)} is not a shard's folder")
                continue
            shard, generation = group
            if shard not in self._generations and generation == 0:
                self._look_at_unrecorded(layout, shard)
            elif shard not in self._generations:
                what = f"shards/{name} is left over, without a commit record"
                self._report_leftover(name, what, shard)
            elif self._groups.get(shard, generation) != generation and (
                (current := self._group_now(shard)) != generation
            ):
                where = f"shards/{group_name(shard, current)}"
                what = f"shards/{name} is left over: the shard lies in {where}"
                self._report_leftover(name, what, shard)
