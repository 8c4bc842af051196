"""Copying a store to another folder or to a URL.

Each file is compared with its record before it is sent. Per shard, the files are sent first, then
its commit record; then `index.npz`, and `store.json` last. An interrupted first copy is therefore
not a store yet, and an interrupted update leaves a store whose every clip is there.
"""

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema.attribute_table import parse_attributes
from cache_schema.checksummed_json import crc32c_digits
from cache_schema.errors import CacheError, Refused, SettingsMismatch, StoreNotFound
from cache_schema.index import (
    ClipIndex,
    commit_path,
    load_index,
    read_crc32c,
)
from cache_schema.index_columns import DamagedIndex, write_columns
from cache_schema.maintenance.check_shard import GroupFile, group_files, read_intact
from cache_schema.maintenance.copy_target import COPYING, FolderTarget, Target, open_target
from cache_schema.names import (
    ATTRIBUTES_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    MAX_RECORD_BYTES,
    STORE_FILE,
    StoreLayout,
    group_name,
    is_shard_name,
    parse_group_name,
)
from cache_schema.records import (
    CommitRecord,
    StoredArray,
    StoreManifest,
    parse_commit,
    parse_manifest,
    read_record_file,
)
from cache_schema.schema import StoreSettings, differing_settings
from cache_schema.shown_text import first_few
from cache_schema.storage import LocalStorage, Storage, open_storage, refuse_links

Advance = Callable[[int], None]

_STREAMS = 4
"""Concurrent transfers over a network; each file is held in memory, encoded and decoded."""

_MAX_NAMED = 3
"""Maximum number of list items named in a message."""


@dataclass(frozen=True, slots=True)
class CopyReport:
    """Result of `copy_store`."""

    store: str
    """The copy's folder or URL."""
    num_shards: int
    num_clips: int
    """Clips in the copy now."""
    num_sent: int
    """Files of shards sent by this run."""
    num_bytes_sent: int
    num_present: int
    """Files of shards that already existed."""


def copy_store(
    source: Path | str, target: Path | str, *, advance: Advance | None = None
) -> CopyReport:
    """Copy all of `source` to `target`; another run sends only what is missing.

    Clips dropped from the source since an earlier copy are also removed from the copy. Staging and
    quarantine are not copied. The target must have no other writer meanwhile.

    Args:
        source: the store's folder or URL; over HTTP it needs an `index.npz`.
        target: the copy's folder or URL, which ends with the store's name.
        advance: called with the number of bytes done, including files that already exist.

    Raises:
        SettingsMismatch, ValueError: the target is another store, or cannot be written to. Nothing
            was done.
        StoreNotFound, UnknownSchemaVersion, CorruptRecord, CorruptClip: from the source; damaged
            files are not sent.
        SymlinkInStore: the target contains a symbolic link among its own files.
        StoreUnreachable: a network storage did not respond.
    """
    source_storage, target_storage = open_storage(source), open_target(target)
    if isinstance(target_storage, FolderTarget):
        refuse_links(StoreLayout(target_storage.folder))
    data = _read_or_none(source_storage, STORE_FILE)
    if data is None:
        raise StoreNotFound(
            f"{source_storage.location} is not a feature store: it has no {STORE_FILE}"
        )
    manifest = parse_manifest(
        data, location=f"{source_storage.location}/{STORE_FILE}", store=source_storage.location
    )
    index = load_index(source_storage, manifest.settings)
    with ExitStack() as stack:
        local = isinstance(source_storage, LocalStorage) and isinstance(
            target_storage, FolderTarget
        )
        pool = ThreadPoolExecutor(1 if local else _STREAMS)
        stack.callback(pool.shutdown, cancel_futures=True)
        copy = _Copy(
            source_storage,
            target_storage,
            manifest.settings,
            index,
            pool,
            advance or (lambda _: None),
        )
        copy.check_target(manifest)
        copy.send_shards()
        copy.send_index()
        target_storage.put(STORE_FILE, data)
        copy.clean_up()
    return CopyReport(
        target_storage.location,
        len(index.shards),
        len(index),
        copy.num_sent,
        copy.num_bytes_sent,
        copy.num_present,
    )


@dataclass
class _Copy:
    """State of one copy operation."""

    source: Storage
    target: Target
    settings: StoreSettings
    index: ClipIndex
    pool: ThreadPoolExecutor
    advance: Advance
    num_sent: int = 0
    num_bytes_sent: int = 0
    num_present: int = 0
    _surplus: list[str] = field(default_factory=list)
    """Files in the target that are no longer in the source, to be removed at the end."""

    def check_target(self, manifest: StoreManifest) -> None:
        """Refuse a target that is, or might be, anything but an older copy."""
        location = self.target.location
        if location == self.source.location:
            raise ValueError(f"{location} cannot be copied to itself")
        data = _read_or_none(self.target, STORE_FILE)
        if data is None:
            self._check_name(manifest)
        else:
            found = parse_manifest(
                data, location=f"{location}/{STORE_FILE}", store=location
            ).settings
            if differing := differing_settings(found, self.settings):
                raise SettingsMismatch(
                    f"{location} is a store that differs in {', '.join(differing)}; copy to "
                    "another folder or URL"
                )
        files = self.target.list_folder("commits") or []
        names = [file.removesuffix(".json") for file in files if file.endswith(".json")]
        shards = [name for name in names if is_shard_name(name)]
        foreign = [
            shard
            for shard, older in zip(shards, self.pool.map(self._is_older, shards), strict=True)
            if not older
        ]
        if foreign:
            named = first_few(list(map(repr, foreign)), _MAX_NAMED)
            raise Refused(
                f"{location} holds clips in shards {named} that {self.source.location} "
                "does not hold; copy to another folder or URL, or delete these shards' files in "
                f"{location}/commits if they are not needed",
                remedy="merge",
            )

    def _check_name(self, manifest: StoreManifest) -> None:
        name = self.target.location.rstrip("/").rsplit("/", 1)[-1]
        wanted = manifest.settings.folder_name
        if name not in (wanted, self.source.location.rstrip("/").rsplit("/", 1)[-1]):
            raise ValueError(
                f"there is no store at {self.target.location}; a copy's folder must be named "
                f"{wanted}: copy to {self.target.location}/{wanted}"
            )

    def _is_older(self, shard: str) -> bool:
        """Whether the target's shard equals the source's, or an earlier state with more clips.

        Only then does replacing it lose nothing that the source does not hold.
        """
        if shard not in self.index.shards:
            return False
        if self.index.has_record_of(self.target, shard):
            return True
        try:
            older, _ = self._record(self.target, shard)
        except CacheError:
            return False
        newer, _ = self._source_record(shard)
        checksums = {clip.key: _checksums(clip.arrays) for clip in older.clips}
        return older.generation < newer.generation and all(
            checksums.get(clip.key) == _checksums(clip.arrays) for clip in newer.clips
        )

    def _record(self, storage: Storage, shard: str) -> tuple[CommitRecord, bytes]:
        """A shard's record, parsed and as bytes."""
        path = commit_path(shard)
        location = f"{storage.location}/{path}"
        data = read_record_file(storage, path)
        record = parse_commit(data, self.settings, shard, location=location, store=storage.location)
        return record, data

    def _source_record(self, shard: str) -> tuple[CommitRecord, bytes]:
        record, data = self._record(self.source, shard)
        if int(crc32c_digits(data), 16) != self.index.record_crc32c(shard):
            raise CacheError(
                f"shard {shard!r} of {self.source.location} was replaced while the store was being "
                "copied; run the same command again"
            )
        return record, data

    def send_shards(self) -> None:
        """Send every shard's files, then its commit record."""
        committed = set(self.target.list_folder("commits") or [])
        for shard in self.index.shards:
            record, data = self._source_record(shard)
            done = f"{shard}.json" in committed and self.index.has_record_of(self.target, shard)
            marker = f"{COPYING}/{shard}.json"
            group = f"shards/{group_name(shard, record.group)}"
            files = group_files(record, self.settings)
            # Matching sizes suffice only for files that were sent for this very record, or that the
            # copy's own record lists identically.
            if done or _read_or_none(self.target, marker) == data:
                sent = {file.path for file in files}
            else:
                sent = (
                    self._committed_files(shard, record) if f"{shard}.json" in committed else set()
                )
                self.target.put(marker, data)
            sizes = self.target.sizes(group)
            present = {
                f.path for f in files if f.path in sent and sizes.get(f.path) == f.recorded.bytes
            }
            self._send(record, group, [file for file in files if file.path not in present])
            self._count_present([file for file in files if file.path in present])
            surplus = sizes.keys() - {file.path for file in files}
            self._surplus += [f"{group}/{path}" for path in sorted(surplus)]
            if not done:
                self.target.put(commit_path(shard), data)
                self.target.remove(marker)

    def _committed_files(self, shard: str, record: CommitRecord) -> set[str]:
        """Files that the target's older record of a shard lists exactly as the source's does."""
        older, _ = self._record(self.target, shard)
        if older.group != record.group:
            return set()
        known = {file.path: file.recorded for file in group_files(older, self.settings)}
        files = group_files(record, self.settings)
        return {file.path for file in files if known.get(file.path) == file.recorded}

    def _send(self, record: CommitRecord, group: str, files: list[GroupFile]) -> None:
        def send(file: GroupFile) -> int:
            self.target.put(f"{group}/{file.path}", read_intact(self.source, record, file))
            return file.recorded.bytes

        for sent in self.pool.map(send, files):
            self.num_sent += 1
            self.num_bytes_sent += sent
            self.advance(sent)

    def _count_present(self, files: list[GroupFile]) -> None:
        self.num_present += len(files)
        for file in files:
            self.advance(file.recorded.bytes)

    def send_index(self) -> None:
        """Send the index of exactly the records that were sent, and `attributes.npz`."""
        file = io.BytesIO()
        store_crc32c = read_crc32c(self.source, STORE_FILE)
        write_columns(file, self.index.columns, self.settings, store_crc32c)
        data = file.getvalue()
        if _read_or_none(self.target, INDEX_FILE, MAX_INDEX_BYTES) != data:
            self.target.put(INDEX_FILE, data)
        self._send_attributes()

    def _send_attributes(self) -> None:
        # It names the records that it was made from, so it may be older than the index.
        data = _read_or_none(self.source, ATTRIBUTES_FILE, MAX_INDEX_BYTES)
        with suppress(DamagedIndex):
            if data is not None:
                parse_attributes(data, self.settings)
                if _read_or_none(self.target, ATTRIBUTES_FILE, MAX_INDEX_BYTES) != data:
                    self.target.put(ATTRIBUTES_FILE, data)
                return
        self._surplus.append(ATTRIBUTES_FILE)

    def clean_up(self) -> None:
        """Remove groups and files that no record names any more, and this copy's markers."""
        for path in self._surplus:
            self.target.remove(path)
        for name in self.target.list_folder("shards") or []:
            group = parse_group_name(name)
            if group is None or group[0] not in self.index.shards:
                continue
            if group[1] != self.index.shards[group[0]].group:
                self.target.remove(f"shards/{name}")
        self.target.remove(COPYING)


def _read_or_none(storage: Storage, path: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
    try:
        return storage.read(path, limit)
    except FileNotFoundError:
        return None


def _checksums(arrays: Mapping[str, StoredArray]) -> dict[str, tuple[int, str]]:
    return {name: (stored.bytes, stored.crc32c) for name, stored in arrays.items()}
