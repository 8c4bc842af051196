"""Files that are whole or absent, also after a crash; used by the writer's modules."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file or folder that the block writes into an `OSError` that names none.

    The system names files where they are opened or moved, not where bytes are written or synced.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_upwards(path: Path, root: Path) -> None:
    """Sync the directory `path` and its parents up to and including `root`."""
    sync(path)
    while path != root:
        path = path.parent
        sync(path)


def sync_folders(path: Path) -> None:
    """Sync the directory `path` and every directory below it; what files hold is not meant."""
    if _sync_file_system(path):
        return
    for folder, _, _ in os.walk(path, topdown=False):
        sync(Path(folder))


def _sync_file_system(path: Path) -> bool:
    """Sync the whole file system of `path`, where the system can: thousands of folders at once."""
    syncfs = getattr(ctypes.CDLL(None), "syncfs", None)
    if syncfs is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(syncfs(descriptor) == 0)
    finally:
        os.close(descriptor)


def open_for_writing(path: Path) -> BinaryIO:
    """An empty file at `path`, open for writing; `OSError` where a symbolic link lies there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_whole(path: Path, data: bytes, *, temporary: Path) -> None:
    """Write `data` to `path` by way of `temporary`, so that `path` is never seen half-written.

    `temporary` lies on the same file system, and nobody else writes it at the same time.
    """
    with naming(path), open_for_writing(temporary) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def make_directories(path: Path) -> None:
    """Create the directory `path` and whatever is missing above it, durably."""
    if path.is_dir():
        return
    existing = next(folder for folder in path.parents if folder.is_dir())
    path.mkdir(parents=True, exist_ok=True)
    sync_upwards(path, existing)
