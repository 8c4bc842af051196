"""Clips of a shard that is being written: staged on disk one by one, adopted after a crash.

Nothing here is visible to readers. Every clip and every skip has a numbered record, written after
the clip's files are synced. A restart keeps the longest run of records, starting with the first,
whose clips are intact, and removes everything else. Zarr's metadata is never adopted: it is
rewritten for the number of clips that were kept.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema.atomic_io import add_path_to_errors, sync, sync_upwards, write_atomic
from cache_schema.checksummed_json import decode_record, encode_record
from cache_schema.claim import ShardClaim
from cache_schema.commit import sync_metadata
from cache_schema.errors import CacheError
from cache_schema.records import (
    ClipEntry,
    SkippedClip,
    StoredArray,
    StoredFile,
    parse_clip,
    parse_skipped,
    read_record_file,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalStorage
from cache_schema.zarr_shard import (
    DamagedFile,
    chunk_path,
    content_crc32c,
    create_group,
    read_clip,
    write_chunk_table,
)

IsCurrent = Callable[[str, str], bool]
"""Whether a clip, given by key and fingerprint, is still up to date with its source."""


class Staging:
    """The staged contents of one shard: `clips` and `skipped`, in the order they were added."""

    def __init__(
        self,
        claim: ShardClaim,
        settings: StoreSettings,
        source: str,
        is_current: IsCurrent | None,
    ) -> None:
        """Adopt what an earlier writer staged, and remove everything else."""
        self._is_current = is_current
        self._settings = settings
        self._claim = claim
        self._shard = claim.shard
        self._source = source
        self._store = claim.layout.root
        self._folder = claim.folder
        self._group = claim.group
        self._records = claim.records
        self.clips: list[ClipEntry] = []
        self.skipped: list[SkippedClip] = []
        with claim.guarded(), add_path_to_errors(self._group):
            _restore_unrecorded_group(claim)
            self._group.mkdir(exist_ok=True)
            self._adopt()
            sync_upwards(self._records, claim.layout.root)

    def add(
        self,
        key: str,
        arrays: dict[str, np.ndarray],
        attributes: dict[str, Any],
        fingerprint: str,
    ) -> None:
        """Stage one validated clip; when this returns, a restart will find it.

        Raises `LockLost` if another writer took the shard over, with the clips before this one.
        """
        self._claim.check()
        with self._claim.guarded(), add_path_to_errors(self._group):
            self._add(key, arrays, attributes, fingerprint)

    def _add(
        self,
        key: str,
        arrays: dict[str, np.ndarray],
        attributes: dict[str, Any],
        fingerprint: str,
    ) -> None:
        index = len(self.clips)
        stored = {}
        for name, values in arrays.items():
            path = chunk_path(name, self._settings.arrays[name], index)
            self._arrays[name].write(index, values)
            file = self._group / path
            table = write_chunk_table(file, self._settings.arrays[name])
            sync(file)
            sync(file.parent)
            size = file.stat().st_size
            stored[name] = StoredArray(path, size, content_crc32c(values), f"{table:08x}")
        clip = ClipEntry(key, self._shard, index, self._source, fingerprint, attributes, stored)
        self._write_record({"clip": clip.as_dict()})
        self.clips.append(clip)

    def skip(self, key: str, reason: str, detail: str, fingerprint: str) -> None:
        """Stage a record that a clip is skipped."""
        skipped = SkippedClip(key, reason, detail, fingerprint, self._shard)
        with self._claim.guarded():
            self._write_record({"skipped": skipped.as_dict()})
        self.skipped.append(skipped)

    def finish(self) -> tuple[Path, dict[str, StoredFile]]:
        """Reduce the group to its clips and sync it; returns its folder and the metadata files."""
        self._claim.check()
        with self._claim.guarded(), add_path_to_errors(self._group):
            self._prune_group()
            files = sync_metadata(self._group, self._settings)
            sync(self._folder)
        return self._group, files

    def _write_record(self, entry: dict[str, Any]) -> None:
        number = len(self.clips) + len(self.skipped)
        record = {"settings_hash": self._settings.hash, "source": self._source, **entry}
        write_atomic(
            self._record_path(number),
            encode_record(record),
            temporary=self._records / ".incomplete",
        )

    def _record_path(self, number: int) -> Path:
        return self._records / f"{number:08d}.json"

    def _adopt(self) -> None:
        entries: list[ClipEntry | SkippedClip] = []
        index = 0
        while (entry := self._read_record(len(entries), index)) is not None:
            entries.append(entry)
            index += isinstance(entry, ClipEntry)
        clips = [entry for entry in entries if isinstance(entry, ClipEntry)]
        damaged = next((clip for clip in clips if not self._is_intact(clip)), None)
        if damaged is not None:
            entries = entries[: entries.index(damaged)]
        self.clips = [entry for entry in entries if isinstance(entry, ClipEntry)]
        self.skipped = [entry for entry in entries if isinstance(entry, SkippedClip)]
        kept = {self._record_path(number) for number in range(len(entries))}
        for path in self._records.iterdir():
            if path not in kept:
                path.unlink()
        self._prune_group()

    def _read_record(self, number: int, index: int) -> ClipEntry | SkippedClip | None:
        """Read a record, which has index `index` if it is a clip's; None if it cannot be used."""
        path = self._record_path(number)
        try:
            data = read_record_file(LocalStorage(self._records), path.name)
            found = decode_record(data, str(path), store=self._store)
            if found["settings_hash"] != self._settings.hash:
                return None
            entry: ClipEntry | SkippedClip
            if "skipped" in found:
                entry = parse_skipped(found["skipped"], self._shard)
            else:
                entry = parse_clip(
                    found["clip"],
                    self._settings,
                    shard=self._shard,
                    source=self._source,
                    index=index,
                )
        except (OSError, CacheError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if self._is_current is not None:
            return entry if self._is_current(entry.key, entry.fingerprint) else None
        return entry if found["source"] == self._source else None

    def _is_intact(self, clip: ClipEntry) -> bool:
        storage = LocalStorage(self._group)
        try:
            for name, stored in clip.arrays.items():
                with storage.open(stored.path) as file:
                    read_clip(file, self._settings.arrays[name], stored.facts)
        except (OSError, DamagedFile):
            return False
        return True

    def _prune_group(self) -> None:
        """Keep only the recorded clips' files, and write metadata for exactly these clips."""
        kept = {self._group / array.path for clip in self.clips for array in clip.arrays.values()}
        for path in sorted(self._group.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()
        self._arrays = create_group(self._group, self._settings, len(self.clips))
        sync(self._group)


def _restore_unrecorded_group(claim: ShardClaim) -> None:
    """Move a group that was published without a commit record back to staging."""
    published = claim.layout.group(claim.shard, 0)
    if not published.exists():
        return
    if any(claim.records.iterdir()) and not claim.group.exists():
        published.rename(claim.group)
    else:
        claim.discard(published)
