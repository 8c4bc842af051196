"""Exclusive claim on a shard: a lock, and a staging folder that a later writer takes over.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from cache_schema.atomic_io import FileLock
from cache_schema.errors import LockLost
from cache_schema.names import StoreLayout
from cache_schema.storage import refuse_links_below

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
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_held():  # Zarr may have recreated folders since
            shutil.rmtree(self._own, ignore_errors=True)
        for folder in (self.records, self.folder, self._own, self._own.parent):
            with suppress(OSError):
                folder.rmdir()  # only if nothing is staged
        self._lock.__exit__(kind, error, traceback)

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
