"""Writing one shard: clips are validated, staged on disk one by one, and committed together.

Nothing staged is visible to readers. Every clip and every skip has a numbered record, written after
the clip's files are synced. A restart keeps the longest run of records, starting with the first,
whose clips are intact, and removes everything else. Zarr's metadata is never adopted: it is
rewritten for the number of clips that were kept.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from cache_schema.atomic_io import add_path_to_errors, sync, sync_upwards, write_atomic
from cache_schema.checksummed_json import decode_record, encode_record, plain_mapping
from cache_schema.commit import (
    CommittedShards,
    ShardClaim,
    commit_group,
    remove_other_files,
    sync_metadata,
)
from cache_schema.errors import AlreadyCommitted, CacheError
from cache_schema.names import (
    StoreLayout,
    check_fingerprint,
    check_identifier,
    check_key,
    check_shard_name,
)
from cache_schema.records import (
    ClipEntry,
    CommitRecord,
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
        remove_other_files(self._group, kept)
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


class ShardWriter:
    """Context manager for exclusive writing of one shard.

    Entering it takes the shard's lock and adopts the intact clips of a writer that was killed.
    Leaving it without `commit` keeps what is staged for a later writer.
    """

    def __init__(
        self,
        layout: StoreLayout,
        settings: StoreSettings,
        name: str,
        source: str,
        committed: CommittedShards,
        is_current: IsCurrent | None,
    ) -> None:
        """Touches no file before `__enter__`."""
        self._is_current = is_current
        self._layout = layout
        self._settings = settings
        self.name = check_shard_name(name)
        self._source = source
        self._committed = committed
        self._claim = ShardClaim(layout, name)
        self._staging: Staging | None = None

    def __enter__(self) -> Self:
        """Claim the shard; `ShardBusy` if it has a writer, `AlreadyCommitted` if committed."""
        self._claim.__enter__()
        try:
            if self._layout.commit(self.name).exists():
                self._claim.clear()
                raise AlreadyCommitted(
                    f"shard {self.name!r} of {self._layout.root} is already committed; check "
                    "is_committed before writing it"
                )
            self._committed.refresh(self.name)
            self._staging = Staging(self._claim, self._settings, self._source, self._is_current)
            self._clip_keys = {clip.key for clip in self._staging.clips}
            skipped = self._staging.skipped
            self._skips = {(clip.key, clip.reason, clip.detail) for clip in skipped}
            self._skipped_keys = {clip.key for clip in skipped}
        except BaseException:
            self._claim.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._staging = None
        self._claim.__exit__()

    def has(self, key: str) -> bool:
        """Whether the clip is already staged or skipped, by this writer or a killed one."""
        self._open_staging()
        return key in self._clip_keys or key in self._skipped_keys

    def shard_holding(self, key: str) -> str | None:
        """The other, committed shard that holds the clip, if `CommittedShards` knows one."""
        self._open_staging()
        return self._committed.shard_of(key)

    def add(
        self,
        key: str,
        arrays: Mapping[str, np.ndarray],
        attributes: Mapping[str, Any] | None = None,
        *,
        fingerprint: str,
    ) -> None:
        """Stage one clip; durable when this returns, visible to readers after `commit`.

        Args:
            key: the clip's name, unique in the store; see `CommittedShards`.
            arrays: every array of the settings, with exactly its data type and shape.
            attributes: JSON facts about this clip.
            fingerprint: identifies what the clip was made from; 32 lower-case hexadecimal digits.

        Raises:
            ValueError: invalid key, array, attribute or fingerprint, or a duplicate key; nothing is
                written.
            LockLost: another process took the shard over.
        """
        staging = self._open_staging()
        check_key(key)
        check_fingerprint(fingerprint)
        if self.has(key):
            raise ValueError(
                f"clip {key!r} is already in shard {self.name!r} of {self._layout.root}; keys must "
                "be unique; has() reports clips that an earlier run staged"
            )
        other_shard = self._committed.shard_of(key)
        if other_shard == self.name:
            self._claim.check()  # another process took the shard over and committed it
        if other_shard is not None:
            raise ValueError(
                f"clip {key!r} of shard {self.name!r} is already in shard "
                f"{other_shard!r} of {self._layout.root}; keys must be unique in a "
                "dataset, so rename one of the two clips"
            )
        subject = f"clip {key!r} for {self._layout.root}"
        plain = plain_mapping(attributes or {}, f"attributes of {subject}")
        staging.add(key, self._check_arrays(arrays, subject), plain, fingerprint)
        self._clip_keys.add(key)

    def skip(self, key: str, reason: str, detail: str, *, fingerprint: str) -> None:
        """Record that a clip is skipped, and why; repeating the same call has no effect.

        Args:
            key: the clip's name; it may also be in the store, if the skipped clip is a second one
                with that name.
            reason: a word for counting, such as `too_short`.
            detail: a sentence for users.
            fingerprint: fingerprint of what was available of the clip, as in `add`.
        """
        staging = self._open_staging()
        check_key(key)
        check_fingerprint(fingerprint)
        check_identifier(reason, f"reason for skipping clip {key!r}")
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        if (key, reason, detail) not in self._skips:
            staging.skip(key, reason, detail, fingerprint)
            self._skips.add((key, reason, detail))
            self._skipped_keys.add(key)

    def commit(self) -> None:
        """Publish the shard: rename the group, then write the commit record.

        Then update the index, if it lacks many shards and no other process is doing so.

        Raises:
            LockLost: another writer took the shard over, with everything staged.
            CorruptRecord: the index cannot be written, since a record is damaged or two shards hold
                the same key. This shard is committed nevertheless.
        """
        staging = self._open_staging()
        group, files = staging.finish()
        record = CommitRecord(
            self.name, 0, 0, self._source, tuple(staging.clips), tuple(staging.skipped), files
        )
        commit_group(self._claim, self._settings, group, record, replaced=None)
        self._staging = None
        self._claim.clear()
        self._committed.add(record)
        self._committed.update_index()

    def _open_staging(self) -> Staging:
        if self._staging is None:
            raise ValueError(
                f"shard {self.name!r} of {self._layout.root} is not being written; use the writer "
                "inside its `with` block, and not after commit()"
            )
        return self._staging

    def _check_arrays(
        self, arrays: Mapping[str, np.ndarray], subject: str
    ) -> dict[str, np.ndarray]:
        if sorted(arrays) != sorted(self._settings.arrays):
            raise ValueError(
                f"{subject} has the arrays {sorted(arrays)}; the store holds "
                f"{sorted(self._settings.arrays)}"
            )
        for name, spec in self._settings.arrays.items():
            values = arrays[name]
            if not isinstance(values, np.ndarray):
                raise ValueError(
                    f"{name} of {subject} is a {type(values).__name__}, not an ndarray"
                )
            if values.dtype != spec.numpy_dtype or values.shape != spec.shape:
                raise ValueError(
                    f"{name} of {subject} is {values.dtype} {values.shape}; the store holds "
                    f"{spec.dtype} {spec.shape}"
                )
            if spec.numpy_dtype.kind == "f" and not np.isfinite(values).all():
                bad = int(values.size - np.isfinite(values).sum())
                raise ValueError(
                    f"{name} of {subject} has {bad} of {values.size} values that are NaN or "
                    "infinite"
                )
        return {name: arrays[name] for name in self._settings.arrays}
