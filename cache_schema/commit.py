"""Claiming a shard, committing its staged group, and cleaning up after killed processes.

A claim is a lock, and a staging folder that a later writer takes over.

A lock can be lost without its holder noticing, when its file is deleted or a server forgets it. The
lock therefore only keeps writers from disturbing each other; the staging folder decides who may
publish. A writer first creates `.staging/<shard>/<token>/` and then moves every other writer's
folder into its own. Every change to the store is a rename out of or into the writer's folder, by
path, and fails if another writer has moved that folder. Of two writers at least one sees the
other's folder, so at most one can publish.
"""

import errno
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Self

from cache_schema.atomic_io import FileLock, make_directories, sync, sync_upwards, write_atomic
from cache_schema.checksummed_json import HEAD_BYTES, crc32c_digits, crc32c_hex, encode_record
from cache_schema.errors import CorruptRecord, LockLost, ShardBusy
from cache_schema.index import ClipIndex, load_index, write_index
from cache_schema.index_columns import num_listed_shards
from cache_schema.names import StoreLayout, parse_group_name, without_retry
from cache_schema.packed_strings import SortedText
from cache_schema.records import CommitRecord, StoredFile, committed_shards, read_commit
from cache_schema.schema import StoreSettings
from cache_schema.storage import LocalStorage, refuse_links_below
from cache_schema.zarr_shard import metadata_paths

_STAGED = "staged"
_RECORDS = "records"
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_TOKEN = re.compile(r"[0-9a-f]{16}", re.ASCII)


class ShardClaim:
    """Context manager: the exclusive right to change one shard, with a folder to stage changes in.

    After entering it, `folder` holds what earlier writers had staged. Leaving it keeps what is
    staged, unless `clear` was called.
    """

    def __init__(self, layout: StoreLayout, shard: str) -> None:
        """Touches no file before `__enter__`; the store's folder must exist by then."""
        self.layout = layout
        self.shard = shard
        self._subject = f"shard {shard!r} of {layout.root}"
        self._lock = FileLock(layout.lock(shard), wait=False, what=self._subject)
        self._own = layout.staged(shard) / secrets.token_hex(8)
        self._discarded = count()
        self.folder = self._own / _STAGED
        """Staging folder with everything of the shard that is not committed yet."""
        self.group = self.folder / "shard"
        """The Zarr group being written; renamed into `shards/` when complete."""
        self.records = self.folder / _RECORDS
        """One record per clip that is complete in the group, or skipped. Only `__enter__` creates
        this folder, so its absence shows that the claim was lost; Zarr recreates other missing
        folders."""

    def __enter__(self) -> Self:
        """Claim the shard.

        Raises:
            ShardBusy: another process holds its lock.
            LockLost: another process took the shard over at the same moment.
            SymlinkInStore: there is a symbolic link in its staging folder.
        """
        self.layout.staging.mkdir(exist_ok=True)
        self._lock.__enter__()
        try:
            with self.guarded():
                refuse_links_below(self.layout.staged(self.shard))
                self._own.mkdir(parents=True)
                self._take_over_staging()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_held():  # Zarr may have recreated folders since
            shutil.rmtree(self._own, ignore_errors=True)
        for folder in (self.records, self.folder, self._own, self._own.parent):
            with suppress(OSError):
                folder.rmdir()  # only if nothing is staged
        self._lock.__exit__()

    def check(self) -> None:
        """Raise `LockLost` if another writer has taken the shard over."""
        if not self._is_held():
            raise self._lock_lost_error()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Convert an `OSError` in the block to `LockLost` if it was caused by losing the shard."""
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE or self._is_held():
                raise
            raise self._lock_lost_error() from error

    def discard(self, path: Path) -> None:
        """Remove a folder of the shard that no commit record names, if the claim is still valid."""
        gone = self._own / f"discarded-{next(self._discarded)}"
        with self.guarded():
            path.rename(gone)
            shutil.rmtree(gone)

    def discard_files(self, paths: Iterable[Path]) -> set[Path]:
        """Remove files of the shard that no commit record names, if the claim is still valid.

        Returns the folders to sync; until then a power failure could bring the files back.
        """
        folders: set[Path] = set()
        for path in paths:
            if path.exists():
                gone = self.records / f"discarded-{next(self._discarded)}"
                with self.guarded():
                    path.rename(gone)
                    folders.add(path.parent)
                    gone.unlink()
        return folders

    def clear(self) -> None:
        """Remove everything that is staged, after the shard is committed."""
        with suppress(LockLost):  # the process that took it over cleans up
            self.discard(self.folder)

    def _take_over_staging(self) -> None:
        """Move other writers' folders into this one; adopt the staging with the most records."""
        others = [other for other in sorted(self._own.parent.iterdir()) if other != self._own]
        for other in others:
            with suppress(FileNotFoundError):  # its writer has just finished
                other.rename(self._own / other.name)
        staged = max(_staged_folders(self._own), key=_num_records, default=None)
        if staged is None:
            self.folder.mkdir()
        else:
            staged.rename(self.folder)
        self.records.mkdir(exist_ok=True)
        for other in sorted(self._own.iterdir()):
            if other != self.folder:
                self.discard(other)

    def _is_held(self) -> bool:
        return self.records.is_dir()

    def _lock_lost_error(self) -> LockLost:
        return LockLost(
            f"{self._subject} was taken over by another process after this process lost the lock "
            f"{self.layout.lock(self.shard)}: the lock file was deleted, or the file system does "
            "not keep locks between all machines that write. Nothing committed was changed; stop "
            "the other process or wait for it, then run the same command again"
        )


def staged_records(layout: StoreLayout, shard: str) -> Path | None:
    """The folder of staged records of a shard; None if nothing is staged."""
    found = layout.staged(shard).glob(f"*/{_STAGED}/{_RECORDS}")
    return next(iter(sorted(found)), None)


def _staged_folders(folder: Path) -> Iterator[Path]:
    """Staging folders of this writer and of the writers that it had taken over."""
    for entry in sorted(folder.iterdir()):
        if entry.name == _STAGED:
            yield entry
        elif _TOKEN.fullmatch(entry.name) and entry.is_dir():
            yield from _staged_folders(entry)


def _num_records(staged: Path) -> int:
    records = staged / _RECORDS
    return len(list(records.iterdir())) if records.is_dir() else -1


def sync_metadata(group: Path, settings: StoreSettings) -> dict[str, StoredFile]:
    """Sync the metadata that Zarr wrote in a group; returns sizes and checksums for the record."""
    files = {}
    for path in metadata_paths(settings):
        file = group / path
        sync(file)
        sync_upwards(file.parent, group)
        data = file.read_bytes()
        files[path] = StoredFile(len(data), crc32c_hex(data))
    return files


def remove_other_files(folder: Path, kept: Container[Path]) -> None:
    """Remove the files below a folder that are not `kept`, and the folders that become empty."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def commit_group(
    claim: ShardClaim,
    settings: StoreSettings,
    group: Path,
    record: CommitRecord,
    *,
    replaced: int | None,
) -> None:
    """Publish a complete, synced group: rename it, then write the commit record.

    Args:
        claim: the shard's claim.
        settings: the store's settings.
        group: folder of the group, inside the claim's folder.
        record: commit record of the group.
        replaced: the `crc32c` of the shard's record when the caller read it; None if there was no
            record.

    Raises `LockLost` if another writer took the shard over; nothing committed has changed then.
    """
    layout = claim.layout
    target = layout.group(record.shard, record.group)
    make_directories(layout.shards)
    make_directories(layout.commits)
    _check_unchanged(claim, replaced)
    if target.exists():
        raise _changed_error(claim, target)
    with claim.guarded():
        group.rename(target)
        sync(layout.shards)
        _write_record(claim, settings, record)


def commit_record(
    claim: ShardClaim, settings: StoreSettings, record: CommitRecord, *, replaced: int
) -> int:
    """Replace a shard's commit record by one of clips in the same group.

    Args and errors as in `commit_group`. Returns the `crc32c` of the new record.
    """
    _check_unchanged(claim, replaced)
    with claim.guarded():
        return _write_record(claim, settings, record)


def _check_unchanged(claim: ShardClaim, replaced: int | None) -> None:
    claim.check()
    committed = claim.layout.commit(claim.shard)
    found = None
    with suppress(FileNotFoundError):
        head = LocalStorage(committed.parent).read_range(committed.name, 0, HEAD_BYTES)
        found = crc32c_digits(head)
    if found != (None if replaced is None else b"%08x" % replaced):
        raise _changed_error(claim, committed)


def _changed_error(claim: ShardClaim, path: Path) -> LockLost:
    return LockLost(
        f"{path} was written by another process while this process held the lock "
        f"{claim.layout.lock(claim.shard)}; nothing committed was changed. Run the same "
        "command again"
    )


def _write_record(claim: ShardClaim, settings: StoreSettings, record: CommitRecord) -> int:
    data = encode_record(record.as_dict(settings.hash))
    path = claim.layout.commit(record.shard)
    write_atomic(path, data, temporary=claim.records / "commit.json")
    return int(crc32c_digits(data), 16)


def clean_up_store(layout: StoreLayout, settings: StoreSettings) -> None:
    """Remove staging, lock files and replaced groups of committed shards that have no writer."""
    staging = {path.name for path in layout.staging.iterdir()}
    generations = group_generations(layout)
    for shard in committed_shards(layout):
        replaced = len(generations[shard]) > 1
        if not replaced and shard not in staging and layout.lock(shard).name not in staging:
            continue
        try:
            with ShardClaim(layout, shard) as claim:
                if not layout.commit(shard).exists():
                    continue
                _remove_replaced(claim, settings, generations[shard])
                claim.clear()
        except (ShardBusy, LockLost):
            continue  # another process is changing it


def group_generations(layout: StoreLayout) -> defaultdict[str, list[int]]:
    """Sorted generations of every shard that has group folders, committed or not."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    if layout.shards.is_dir():
        for path in layout.shards.iterdir():
            if name := parse_group_name(path.name):
                found[name[0]].append(name[1])
    for generations in found.values():
        generations.sort()
    return found


def _remove_replaced(claim: ShardClaim, settings: StoreSettings, generations: list[int]) -> None:
    try:
        record = read_commit(claim.layout, settings, claim.shard)
    except CorruptRecord:
        return  # the shard's group is unknown; a repair handles this
    for generation in generations:
        group = claim.layout.group(claim.shard, generation)
        if generation != record.group and group.exists():
            claim.discard(group)
    if record.group != record.generation:
        listed = {stored.path for clip in record.clips for stored in clip.arrays.values()}
        group = claim.layout.group(claim.shard, record.group)
        files = {path.relative_to(group).as_posix() for path in group.glob("*/c.*")}
        for folder in claim.discard_files(group / path for path in sorted(files - listed)):
            sync(folder)


_MAX_UNLISTED = 16
_MAX_UNLISTED_SHARE = 1 / 20
"""Committed shards that `index.npz` may lack before a writer adds them: an absolute number, and a
share of those it lists. Opening the store parses that many records. Rewriting the index after each
growth by a twentieth costs about twenty times as much as writing it once for all clips."""


class CommittedShards:
    """Lookup of the committed shard that holds a key, for rejecting duplicate keys while writing.

    A key belongs in one shard. A writer rejects keys of shards that were committed when it opened
    its first one, of those it has committed since, and of committed shards of the input it is
    processing (`00000` and `00000-retry1`), the most likely duplicates between concurrent
    processes. It does not read other shards that are committed meanwhile, since every process would
    then parse all records. If a key ends up in two shards that way, everything that loads the
    records of both refuses and names the key and the shards; `repair` keeps one of the two.

    Methods raise `CorruptRecord` for a damaged record.
    """

    def __init__(self, layout: StoreLayout, settings: StoreSettings) -> None:
        """Touches no file."""
        self._layout = layout
        self._settings = settings
        self._keys: SortedText | None = None

    def refresh(self, shard: str) -> None:
        """Load everything that must be known before `shard` is written."""
        if self._keys is None:
            self._load(load_index(LocalStorage(self._layout.root), self._settings))
        for name in self._committed_retries(shard):
            if name not in self._shard_names and name not in self._added:
                self.add(read_commit(self._layout, self._settings, name))

    def add(self, record: CommitRecord) -> None:
        """Add a shard that was just committed."""
        self._added.add(record.shard)
        self._shard_of_added_key.update((clip.key, record.shard) for clip in record.clips)

    def shard_of(self, key: str) -> str | None:
        """The known committed shard that holds the clip; None if there is none."""
        if key in self._shard_of_added_key:
            return self._shard_of_added_key[key]
        assert self._keys is not None
        row = self._keys.find(key)
        return None if row is None else self._shard_names[int(self._shards[row])]

    def update_index(self) -> None:
        """Update `index.npz` if it lacks many shards, unless another process is doing so."""
        num_listed = num_listed_shards(self._layout.index)
        num_committed = len(LocalStorage(self._layout.root).list_folder(self._layout.commits.name))
        if num_committed - num_listed > max(_MAX_UNLISTED, _MAX_UNLISTED_SHARE * num_listed):
            lock = FileLock(self._layout.store_lock, wait=False, what=f"store {self._layout.root}")
            with suppress(ShardBusy), lock:
                self._load(write_index(self._layout, self._settings, lock))

    def _load(self, index: ClipIndex) -> None:
        """Keep the keys and shards of an index, and drop its other columns."""
        self._keys, self._shards = index.keys, index.columns["clips.shard"]
        self._shard_names = index.shard_names
        self._shard_of_added_key: dict[str, str] = {}
        self._added: set[str] = set()

    def _committed_retries(self, shard: str) -> Iterator[str]:
        """The committed shards among the original of `shard` and all retries of that."""
        original = without_retry(shard)
        retries = (f"{original}-retry{number}" for number in count(1))
        # Retries are numbered consecutively; only `shard` itself may be missing in between.
        numbered = takewhile(lambda name: name == shard or self._is_committed(name), retries)
        return (name for name in (original, *numbered) if self._is_committed(name))

    def _is_committed(self, shard: str) -> bool:
        return self._layout.commit(shard).exists()
