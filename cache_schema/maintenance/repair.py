"""Making a damaged store whole again, with the clips that are intact; used by the console.

What is damaged goes to `quarantine/<number>/`, and nothing is deleted. Intact clips of a damaged
shard stay, in the shard's next generation; damaged ones are recorded as skipped, so that
`extract-features --retry-failed` makes them again. A shard whose record is of no use is taken out
whole. Every step leaves a store that reads right, so a repair can be killed and run again.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cache_schema.atomic_io import FileLock, make_directories, naming, sync
from cache_schema.claim import ShardClaim
from cache_schema.clip_index import write_index
from cache_schema.commit import group_generations, sweep_store
from cache_schema.errors import CorruptRecord, LockLost, ShardBusy, UnknownSchemaVersion
from cache_schema.maintenance.check_shard import check_shard, read_record
from cache_schema.maintenance.drop import DROPPED
from cache_schema.maintenance.replace_shard import keep_clips
from cache_schema.maintenance.verify import Problem, Survey, read_settings
from cache_schema.names import INDEX_FILE, StoreLayout, is_shard_name, parse_group_name
from cache_schema.records import CommitRecord, SkippedClip
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalPlace, is_url, refuse_links

DAMAGED = "damaged"
"""The reason recorded for a clip that was taken out because its files are damaged."""

DUPLICATE = "duplicate_key"
"""The reason recorded for a clip whose key another shard holds too; extraction's own word."""

_DROPPED_ONCE = (
    "it had been dropped, and the shard that said so was taken out; once extract-features has made "
    "the shard again, drop it again"
)

FINDINGS_FILE = "found.json"
"""What was wrong, beside what was taken out for it."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What `repair_store` found and did."""

    found: tuple[Problem, ...]
    """Everything that was wrong."""
    left: tuple[Problem, ...]
    """What of it is still so: harmless, to be mended by hand, or in another writer's hands."""
    quarantine: Path | None
    """Where what was taken out lies now."""
    clips: tuple[SkippedClip, ...]
    """Clips that are no longer in the store, and why; --retry-failed makes the damaged ones."""
    shards: tuple[str, ...]
    """Shards that are no longer in the store; extract-features makes them again, and those that
    are retries with --retry-failed."""


def repair_store(store: Path, *, advance: Callable[[int], None] | None = None) -> RepairReport:
    """Verify a store, take out what is damaged, and write its index anew.

    A damaged `store.json` is taken out too, and the report says so and nothing else: its settings
    can only come from the run's configuration, and extract-features writes it again.

    Args:
        store: the store's folder. Others may read it and write to it meanwhile.
        advance: called with the bytes verified.

    Raises:
        StoreNotFound, UnknownSchemaVersion: from `store.json`.
        SymlinkInStore: it has a symbolic link where only its own files may be.
        ValueError: `store` is a URL; repair the store it was copied from, and copy again.
        OSError: files that may be in order cannot be read, or nothing can be written.
    """
    if is_url(str(store)):
        raise ValueError(
            f"{store} cannot be repaired in place; repair the store it was copied from, and run "
            "sam2vx-pipeline cache copy again"
        )
    layout = StoreLayout(Path(store))
    place = LocalPlace(layout.root)
    try:
        settings = read_settings(place)
    except CorruptRecord as error:
        return _take_out_store_file(layout, str(error))
    refuse_links(layout)
    survey = Survey(place, settings, fast=False, advance=advance or (lambda _: None))
    survey.look()
    if survey.settings_are_foreign:
        return _take_out_store_file(layout, survey.problems[0].what)
    layout.staging.mkdir(exist_ok=True)
    repair = _Repair(layout, settings, survey, _Quarantine(layout, survey.problems))
    repair.run()
    again = Survey(place, settings, fast=True, advance=lambda _: None)
    if any(problem.mend == "repair" for problem in survey.problems):
        again.look()
    still = (problem for problem in again.problems if problem.mend != "extract")
    return RepairReport(
        tuple(survey.problems),
        tuple(dict.fromkeys([*repair.left, *still])),
        repair.quarantine.folder,
        tuple(repair.clips),
        tuple(repair.shards),
    )


def _take_out_store_file(layout: StoreLayout, what: str) -> RepairReport:
    problem = Problem(None, None, what, "repair")
    quarantine = _Quarantine(layout, [problem])
    quarantine.take(layout.store_file)
    if layout.index.exists():  # it knows the one that was taken out
        quarantine.take(layout.index)
    left = Problem(
        None,
        None,
        f"{layout.store_file} was damaged and taken out; run sam2vx-pipeline extract-features with "
        "the configuration the store was made with, which writes it again and keeps every shard, "
        "then repair again",
        "by hand",
    )
    return RepairReport((problem,), (left,), quarantine.folder, (), ())


class _Quarantine:
    """A new numbered folder, made when the first thing is put there."""

    def __init__(self, layout: StoreLayout, found: Iterable[Problem]) -> None:
        self._layout = layout
        self._found = list(found)
        self.folder: Path | None = None

    def take(self, path: Path) -> None:
        """Move a file or folder of the store to the same place in the quarantine."""
        target = self.made() / path.relative_to(self._layout.root)
        make_directories(target.parent)
        path.rename(target)
        sync(target.parent)
        sync(path.parent)

    def made(self) -> Path:
        """The folder, which is there after this."""
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
            with naming(findings):
                findings.write_text(text, encoding="utf-8")
            sync(self._layout.quarantine)
            self.folder = folder
        return self.folder


@dataclass
class _Repair:
    """One repair; every shard under its own lock, looked at again once it is held."""

    layout: StoreLayout
    settings: StoreSettings
    survey: Survey
    quarantine: _Quarantine
    left: list[Problem] = field(default_factory=list)
    clips: list[SkippedClip] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Mend what can be mended."""
        self.left += [problem for problem in self.survey.problems if problem.mend != "repair"]
        mendable = [problem for problem in self.survey.problems if problem.mend == "repair"]
        by_hand = {problem.shard for problem in self.left if problem.mend == "by hand"}
        busy: set[str] = set()
        # In ascending order: of a key in two shards the first one's is kept, unless that is
        # damaged and gone by the time the second one's turn comes.
        for shard in sorted(
            {problem.shard for problem in mendable if problem.shard is not None} - by_hand
        ):
            try:
                with ShardClaim(self.layout, shard) as claim:
                    self._mend_shard(claim)
            except ShardBusy:
                busy.add(shard)
            except LockLost as error:
                self.left.append(Problem(shard, None, f"skipped: {error}", "repair"))
        self.left += [problem for problem in mendable if problem.shard in busy]
        for path in self._foreign():
            self.quarantine.take(path)
        # One that lists a shard that is taken out would say that its record is lost.
        if (self.survey.index_is_damaged or self.shards) and self.layout.index.exists():
            self.quarantine.take(self.layout.index)
        if not by_hand:
            sweep_store(self.layout, self.settings)  # lock files and staging of killed processes
        try:
            with FileLock(
                self.layout.store_lock, wait=True, what=f"store {self.layout.root}"
            ) as lock:
                write_index(self.layout, self.settings, lock)
        except (CorruptRecord, UnknownSchemaVersion):
            return  # for what is left; a store can be read without the index
        except LockLost as error:
            told = f"{INDEX_FILE} was not written: {error}"
            self.left.append(Problem(None, None, told, "repair"))
            return
        self.left = [problem for problem in self.left if problem.shard is not None]

    def _mend_shard(self, claim: ShardClaim) -> None:
        shard = claim.shard
        try:
            record, crc32c = read_record(LocalPlace(self.layout.root), self.settings, shard)
        except UnknownSchemaVersion:
            return
        except FileNotFoundError:
            # A writer takes back the first generation that it has left itself, and no other one.
            if shard in self.survey.lost:
                self._take_whole(claim)
            else:
                self._take_groups(claim, but=0)
            return
        except CorruptRecord:
            self._take_whole(claim)
            return
        if shard in self.survey.contradicted and crc32c == self.survey.crc32cs[shard]:
            self._take_whole(claim)
            return
        self._take_groups(claim, but=record.group)
        damage = check_shard(
            LocalPlace(self.layout.root),
            self.settings,
            record,
            fast=False,
            advance=lambda _: None,
        )
        made_from = {clip.key: clip.fingerprint for clip in record.clips}
        out = {
            key: SkippedClip(key, DAMAGED, what, made_from[key], shard)
            for key, what in damage.clips.items()
        }
        for key, other in self._held_elsewhere(record).items():
            told = f"shard {other!r} holds that key"
            out.setdefault(key, SkippedClip(key, DUPLICATE, told, made_from[key], shard))
        if damage or out:
            keep_clips(
                claim,
                self.settings,
                record,
                [clip for clip in record.clips if clip.key not in out],
                [*record.skipped, *out.values()],
                crc32c=crc32c,
                quarantine=self.quarantine.made() / "shards",
            )
            self.clips += out.values()
            return
        group = self.layout.group(shard, record.group)
        for path in damage.foreign:
            self._take(claim, group / path)

    def _held_elsewhere(self, record: CommitRecord) -> dict[str, str]:
        """Keys of a shard that an earlier one holds as well, as of now."""
        found: dict[str, str] = {}
        keys = {clip.key for clip in record.clips}
        others = {
            other
            for key in keys & self.survey.twins.keys()
            for other in self.survey.twins[key]
            if other < record.shard
        }
        for other in sorted(others):
            try:
                theirs, _ = read_record(LocalPlace(self.layout.root), self.settings, other)
            except (CorruptRecord, FileNotFoundError):
                continue
            for clip in theirs.clips:
                if clip.key in keys:
                    found.setdefault(clip.key, other)
        return found

    def _take_whole(self, claim: ShardClaim) -> None:
        """Take out a shard's groups and its record; what was dropped from it must not come back."""
        shard = claim.shard
        self._take_groups(claim, but=None)
        if os.path.lexists(self.layout.commit(shard)):
            self._take(claim, self.layout.commit(shard))
        self.shards.append(shard)
        self.left += [
            Problem(shard, key, _DROPPED_ONCE, "by hand") for key in self._dropped.get(shard, ())
        ]

    @cached_property
    def _dropped(self) -> dict[str, list[str]]:
        """Keys that were dropped, by the shard that says so in the index."""
        found: dict[str, list[str]] = {}
        if self.survey.index is not None:
            for clip in self.survey.index.all_skipped():
                if clip.reason == DROPPED:
                    found.setdefault(clip.shard, []).append(clip.key)
        return found

    def _take_groups(self, claim: ShardClaim, *, but: int | None) -> None:
        """Take out a shard's groups of all generations but one."""
        for generation in self._generations[claim.shard]:
            path = self.layout.group(claim.shard, generation)
            if generation != but and os.path.lexists(path):
                self._take(claim, path)

    def _take(self, claim: ShardClaim, path: Path) -> None:
        """Take out what is the shard's; `LockLost` where another process took that over."""
        claim.check()
        with claim.guarded():
            self.quarantine.take(path)

    @cached_property
    def _generations(self) -> Mapping[str, list[int]]:
        """Of every shard those that have a group, as the repair began."""
        return group_generations(self.layout)

    def _foreign(self) -> list[Path]:
        """What lies among records and groups and is neither."""
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
