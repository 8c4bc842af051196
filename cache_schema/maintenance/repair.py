"""Repairing a damaged store, keeping all intact clips.

Damaged data is moved to `quarantine/<number>/`; nothing is deleted. Intact clips of a damaged shard
stay, in the shard's next generation; damaged ones are recorded as skipped, so that a retry makes
them again. A shard whose record is unusable is quarantined
completely. Every step leaves a store that reads correctly, so a repair can be killed and run again.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cache_schema.atomic_io import FileLock, add_path_to_errors, make_directories, sync
from cache_schema.commit import ShardClaim, clean_up_store, group_generations
from cache_schema.errors import CorruptRecord, LockLost, Refused, ShardBusy, UnknownSchemaVersion
from cache_schema.index import write_index
from cache_schema.maintenance.check_shard import check_shard, read_record
from cache_schema.maintenance.drop import DROPPED, keep_clips
from cache_schema.maintenance.verify import Problem, Survey, read_settings
from cache_schema.names import INDEX_FILE, StoreLayout, is_shard_name, parse_group_name
from cache_schema.records import CommitRecord, SkippedClip
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalStorage, is_url, refuse_links

DAMAGED = "damaged"
"""The recorded reason of clips that were removed because their files are damaged."""

DUPLICATE = "duplicate_key"
"""The recorded reason of clips whose key is also in another shard; same as in extraction."""

_DROPPED_ONCE = (
    "it had been dropped, but the shard that recorded this was quarantined; drop it again when the "
    "shard has been made again"
)

FINDINGS_FILE = "found.json"
"""List of the problems found, saved next to the quarantined files."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """Result of `repair_store`."""

    found: tuple[Problem, ...]
    """All problems that were found."""
    remaining: tuple[Problem, ...]
    """Problems that remain: harmless, to be fixed by hand, or in shards of another writer."""
    quarantine: Path | None
    """Folder that the damaged files were moved to."""
    clips: tuple[SkippedClip, ...]
    """Clips no longer in the store, and why; a retry makes the damaged ones again."""
    shards: tuple[str, ...]
    """Shards that are no longer in the store; extraction makes them again, retry shards on a
    retry."""


def repair_store(store: Path, *, advance: Callable[[int], None] | None = None) -> RepairReport:
    """Verify a store, quarantine what is damaged, and rewrite its index.

    If `store.json` is damaged, it is quarantined and nothing else is repaired: its settings can
    only come from the run's configuration, and the next extraction writes it again.

    Args:
        store: the store's folder. Other processes may read it and write to it meanwhile.
        advance: called with the number of bytes verified.

    Raises:
        StoreNotFound, UnknownSchemaVersion: from `store.json`.
        SymlinkInStore: it contains a symbolic link among its own files.
        Refused: `store` is a URL; repair the store it was copied from, and copy again.
        OSError: files that may be intact cannot be read, or nothing can be written.
    """
    if is_url(str(store)):
        raise Refused(
            f"{store} cannot be repaired in place; repair the store it was copied from, then copy "
            "it again",
            remedy="copy",
        )
    layout = StoreLayout(Path(store))
    storage = LocalStorage(layout.root)
    try:
        settings = read_settings(storage)
    except CorruptRecord as error:
        return _quarantine_store_file(layout, str(error))
    refuse_links(layout)
    survey = Survey(storage, settings, fast=False, advance=advance or (lambda _: None))
    survey.run()
    if survey.has_foreign_settings:
        return _quarantine_store_file(layout, survey.problems[0].what)
    layout.staging.mkdir(exist_ok=True)
    repair = _Repair(layout, settings, survey, _Quarantine(layout, survey.problems))
    repair.run()
    recheck = Survey(storage, settings, fast=True, advance=lambda _: None)
    if any(problem.remedy == "repair" for problem in survey.problems):
        recheck.run()
    remaining = (problem for problem in recheck.problems if problem.remedy != "extract")
    return RepairReport(
        tuple(survey.problems),
        tuple(dict.fromkeys([*repair.remaining, *remaining])),
        repair.quarantine.folder,
        tuple(repair.clips),
        tuple(repair.shards),
    )


def _quarantine_store_file(layout: StoreLayout, what: str) -> RepairReport:
    problem = Problem(None, None, what, "repair")
    quarantine = _Quarantine(layout, [problem])
    quarantine.move(layout.store_file)
    if layout.index.exists():  # it refers to the quarantined store.json
        quarantine.move(layout.index)
    remaining = Problem(
        None,
        None,
        f"{layout.store_file} was damaged and quarantined; repair again when it is rewritten",
        "rewrite",
    )
    return RepairReport((problem,), (remaining,), quarantine.folder, (), ())


class _Quarantine:
    """A new numbered folder, created when the first file is moved there."""

    def __init__(self, layout: StoreLayout, found: Iterable[Problem]) -> None:
        self._layout = layout
        self._found = list(found)
        self.folder: Path | None = None

    def move(self, path: Path) -> None:
        """Move a file or folder of the store to the same relative path in the quarantine."""
        target = self.create() / path.relative_to(self._layout.root)
        make_directories(target.parent)
        path.rename(target)
        sync(target.parent)
        sync(path.parent)

    def create(self) -> Path:
        """Create the folder unless it exists, and return it."""
        if self.folder is None:
            make_directories(self._layout.quarantine)
            names = [path.name for path in self._layout.quarantine.iterdir()]
            numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
            folder = self._layout.quarantine / str(max(numbers, default=0) + 1)
            folder.mkdir()
            found = [
                {"shard": problem.shard, "key": problem.key, "what": problem.what}
                for problem in self._found
            ]
            text = json.dumps(found, indent=1)
            findings = folder / FINDINGS_FILE
            with add_path_to_errors(findings):
                findings.write_text(text, encoding="utf-8")
            sync(self._layout.quarantine)
            self.folder = folder
        return self.folder


@dataclass
class _Repair:
    """State of one repair; every shard is checked again under its own lock."""

    layout: StoreLayout
    settings: StoreSettings
    survey: Survey
    quarantine: _Quarantine
    remaining: list[Problem] = field(default_factory=list)
    clips: list[SkippedClip] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Repair everything that can be repaired."""
        self.remaining += [
            problem for problem in self.survey.problems if problem.remedy != "repair"
        ]
        repairable = [problem for problem in self.survey.problems if problem.remedy == "repair"]
        by_hand = {problem.shard for problem in self.remaining if problem.remedy == "by hand"}
        busy: set[str] = set()
        # In ascending order: a key in two shards is kept in the first, unless it has been found
        # damaged and removed there before the second is repaired.
        for shard in sorted(
            {problem.shard for problem in repairable if problem.shard is not None} - by_hand
        ):
            try:
                with ShardClaim(self.layout, shard) as claim:
                    self._repair_shard(claim)
            except ShardBusy:
                busy.add(shard)
            except LockLost as error:
                self.remaining.append(Problem(shard, None, f"skipped: {error}", "repair"))
        self.remaining += [problem for problem in repairable if problem.shard in busy]
        for path in self._foreign():
            self.quarantine.move(path)
        # An index that lists a quarantined shard would make its record look lost.
        if (self.survey.index_is_damaged or self.shards) and self.layout.index.exists():
            self.quarantine.move(self.layout.index)
        if self.survey.attributes_are_damaged and self.layout.attributes.exists():
            self.quarantine.move(self.layout.attributes)
        if not by_hand:
            clean_up_store(self.layout, self.settings)  # lock files and staging of killed processes
        try:
            with FileLock(
                self.layout.store_lock, wait=True, what=f"store {self.layout.root}"
            ) as lock:
                write_index(self.layout, self.settings, lock)
        except (CorruptRecord, UnknownSchemaVersion):
            return  # because of a remaining problem; a store can be read without the index
        except LockLost as error:
            detail = f"{INDEX_FILE} was not written: {error}"
            self.remaining.append(Problem(None, None, detail, "repair"))
            return
        self.remaining = [problem for problem in self.remaining if problem.shard is not None]

    def _repair_shard(self, claim: ShardClaim) -> None:
        shard = claim.shard
        try:
            record, crc32c = read_record(LocalStorage(self.layout.root), self.settings, shard)
        except UnknownSchemaVersion:
            return
        except FileNotFoundError:
            # A writer recovers only generation 0, if a killed writer left it.
            if shard in self.survey.lost:
                self._quarantine_shard(claim)
            else:
                self._quarantine_groups(claim, keep=0)
            return
        except CorruptRecord:
            self._quarantine_shard(claim)
            return
        if shard in self.survey.conflicting and crc32c == self.survey.crc32cs[shard]:
            self._quarantine_shard(claim)
            return
        self._quarantine_groups(claim, keep=record.group)
        damage = check_shard(
            LocalStorage(self.layout.root),
            self.settings,
            record,
            fast=False,
            advance=lambda _: None,
        )
        fingerprints = {clip.key: clip.fingerprint for clip in record.clips}
        out = {
            key: SkippedClip(key, DAMAGED, what, fingerprints[key], shard)
            for key, what in damage.clips.items()
        }
        for key, other in self._keys_in_earlier_shards(record).items():
            detail = f"shard {other!r} holds the same key"
            out.setdefault(key, SkippedClip(key, DUPLICATE, detail, fingerprints[key], shard))
        if damage or out:
            keep_clips(
                claim,
                self.settings,
                record,
                [clip for clip in record.clips if clip.key not in out],
                [*record.skipped, *out.values()],
                crc32c=crc32c,
                quarantine=self.quarantine.create() / "shards",
            )
            self.clips += out.values()
            return
        group = self.layout.group(shard, record.group)
        for path in damage.foreign:
            self._quarantine_path(claim, group / path)

    def _keys_in_earlier_shards(self, record: CommitRecord) -> dict[str, str]:
        """Keys of a shard that are also in an earlier one now, and that shard."""
        found: dict[str, str] = {}
        keys = {clip.key for clip in record.clips}
        others = {
            other
            for key in keys & self.survey.duplicates.keys()
            for other in self.survey.duplicates[key]
            if other < record.shard
        }
        for other in sorted(others):
            try:
                other_record, _ = read_record(LocalStorage(self.layout.root), self.settings, other)
            except (CorruptRecord, FileNotFoundError):
                continue
            for clip in other_record.clips:
                if clip.key in keys:
                    found.setdefault(clip.key, other)
        return found

    def _quarantine_shard(self, claim: ShardClaim) -> None:
        """Quarantine a shard's groups and record; report clips that had been dropped from it."""
        shard = claim.shard
        self._quarantine_groups(claim, keep=None)
        if os.path.lexists(self.layout.commit(shard)):
            self._quarantine_path(claim, self.layout.commit(shard))
        self.shards.append(shard)
        self.remaining += [
            Problem(shard, key, _DROPPED_ONCE, "by hand") for key in self._dropped.get(shard, ())
        ]

    @cached_property
    def _dropped(self) -> dict[str, list[str]]:
        """Keys of dropped clips, by the shard that the index lists them for."""
        found: dict[str, list[str]] = {}
        if self.survey.index is not None:
            for clip in self.survey.index.all_skipped():
                if clip.reason == DROPPED:
                    found.setdefault(clip.shard, []).append(clip.key)
        return found

    def _quarantine_groups(self, claim: ShardClaim, *, keep: int | None) -> None:
        """Quarantine a shard's groups of all generations except `keep`."""
        for generation in self._generations[claim.shard]:
            path = self.layout.group(claim.shard, generation)
            if generation != keep and os.path.lexists(path):
                self._quarantine_path(claim, path)

    def _quarantine_path(self, claim: ShardClaim, path: Path) -> None:
        """Quarantine a path of the shard; `LockLost` if another process took the shard over."""
        claim.check()
        with claim.guarded():
            self.quarantine.move(path)

    @cached_property
    def _generations(self) -> Mapping[str, list[int]]:
        """Generations with a group folder, by shard, when the repair began."""
        return group_generations(self.layout)

    def _foreign(self) -> list[Path]:
        """Entries of `commits/` and `shards/` that are neither records nor groups."""
        found = []
        if self.layout.commits.is_dir():
            found += [
                path
                for path in sorted(self.layout.commits.iterdir())
                if path.suffix != ".json" or not is_shard_name(path.stem)
            ]
        if self.layout.shards.is_dir():
            found += [
                path
                for path in sorted(self.layout.shards.iterdir())
                if parse_group_name(path.name) is None
            ]
        return found
