"""One writer at a time for a shard: its lock, and a folder that a later writer takes over.

A lock can be lost without its holder noticing: its file is deleted, a server forgets it. So the
lock only keeps writers from disturbing each other, and the folder decides. A writer first makes
`.staging/<shard>/<token>/` and then moves every other writer's folder into its own. Everything that
changes the store is a rename out of the writer's folder or into it, by its path, and fails for a
writer whose folder was taken over: of two writers at least one sees the other's folder, so at most
one of them can publish.
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
    """Context manager: the right to change one shard, and the folder to prepare changes in.

    What earlier writers had staged is in `folder` afterwards. Leaving the context keeps what is
    staged, unless `sweep` was called.
    """

    def __init__(self, layout: StoreLayout, shard: str) -> None:
        """Touches no file before `__enter__`; the store's folder exists by then."""
        self.layout = layout
        self.shard = shard
        self._what = f"shard {shard!r} of {layout.root}"
        self._lock = FileLock(layout.lock(shard), wait=False, what=self._what)
        self._own = layout.staged(shard) / secrets.token_hex(8)
        self._discarded = count()
        self.folder = self._own / _STAGED
        """Everything of the shard that is not committed yet."""
        self.group = self.folder / "shard"
        """The Zarr group being written; renamed to its place among the shards when complete."""
        self.records = self.folder / _RECORDS
        """One record per clip that is safe in the group, or skipped. Nobody makes this folder but
        a claim as it begins: Zarr makes missing folders again, and this one then stays missing."""

    def __enter__(self) -> Self:
        """Take the shard.

        Raises:
            ShardBusy: another process holds its lock.
            LockLost: another process took it over in this very moment.
            SymlinkInStore: there is a symbolic link in its staging.
        """
        self.layout.staging.mkdir(exist_ok=True)
        self._lock.__enter__()
        try:
            with self.guarded():
                refuse_links_below(self.layout.staged(self.shard))
                self._own.mkdir(parents=True)
                self._take_over()
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
        if not self._is_held():  # what Zarr has made again since, for nobody
            shutil.rmtree(self._own, ignore_errors=True)
        for folder in (self.records, self.folder, self._own, self._own.parent):
            with suppress(OSError):
                folder.rmdir()  # where nothing is staged
        self._lock.__exit__(kind, error, traceback)

    def check(self) -> None:
        """Raise `LockLost` if another writer has taken the shard over."""
        if not self._is_held():
            raise self._lost()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Raise `LockLost` for what fails in the block because the shard was taken over."""
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE or self._is_held():
                raise
            raise self._lost() from error

    def discard(self, path: Path) -> None:
        """Remove a folder of the shard, which no commit record names, if the claim still holds."""
        gone = self._own / f"discarded-{next(self._discarded)}"
        with self.guarded():
            path.rename(gone)
            shutil.rmtree(gone)

    def discard_files(self, paths: Iterable[Path]) -> set[Path]:
        """Remove files of the shard, which no commit record names, if the claim still holds.

        Returns the folders to sync, lest what was dropped comes back after a power failure.
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

    def sweep(self) -> None:
        """Remove everything that is staged: the shard is committed, and the claim is done with."""
        with suppress(LockLost):  # whoever took it over sweeps
            self.discard(self.folder)

    def _take_over(self) -> None:
        """Move what others have staged below the own folder, and go on with the most of it."""
        others = [other for other in sorted(self._own.parent.iterdir()) if other != self._own]
        for other in others:
            with suppress(FileNotFoundError):  # its writer was just done
                other.rename(self._own / other.name)
        staged = max(_staged_below(self._own), key=_num_records, default=None)
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

    def _lost(self) -> LockLost:
        return LockLost(
            f"{self._what} was taken over by another process, since this one had lost the lock "
            f"{self.layout.lock(self.shard)}: the file was deleted, or the file system does not "
            "keep locks between all machines that write. Nothing committed was changed; stop "
            "the other process or wait for it, then run the same command again"
        )


def staged_records(layout: StoreLayout, shard: str) -> Path | None:
    """The records of whoever has staged something of a shard; None if nobody has."""
    found = layout.staged(shard).glob(f"*/{_STAGED}/{_RECORDS}")
    return next(iter(sorted(found)), None)


def _staged_below(folder: Path) -> Iterator[Path]:
    """What was staged in this writer's folder, and in those that it was about to take over."""
    for entry in sorted(folder.iterdir()):
        if entry.name == _STAGED:
            yield entry
        elif _TOKEN.fullmatch(entry.name) and entry.is_dir():
            yield from _staged_below(entry)


def _num_records(staged: Path) -> int:
    records = staged / _RECORDS
    return len(list(records.iterdir())) if records.is_dir() else -1
