"""Writable storages that a store can be copied to: a local folder, or a URL."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol

from cache_schema.atomic_io import make_directories, sync, write_atomic
from cache_schema.storage import (
    FsspecStorage,
    LocalStorage,
    Storage,
    is_url,
    refuse_links_on_path,
)

COPYING = ".staging/.copy"
"""Folder for a copy's markers and temporary files in its target; not a valid shard name."""


def is_inside(path: str) -> bool:
    """Whether a path from a listing stays inside the folder that it is relative to."""
    return not path.startswith("/") and not {"", ".", ".."} & set(path.split("/"))


class Target(Storage, Protocol):
    """A writable storage; a file is either complete or absent."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file, creating its folders and replacing an existing one."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder, by relative path; empty if it does not exist."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""


def open_target(location: Path | str) -> Target:
    """The writable storage at a local path or a URL; nothing is accessed yet.

    Raises `ValueError` for a web server, which cannot be written to.
    """
    if isinstance(location, str) and is_url(location):
        if location.startswith(("http://", "https://")):
            raise ValueError(
                f"{location} is on a web server, which takes no files; copy to the folder that it "
                "serves, or to an object store such as s3://bucket/cache"
            )
        return UrlTarget(location)
    return FolderTarget(Path(location))


class FolderTarget(LocalStorage):
    """A local folder; files are synced to disk when `put` returns."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file by renaming a temporary one."""
        refuse_links_on_path(self.folder, path)
        refuse_links_on_path(self.folder, COPYING)
        copying = self.folder / COPYING
        make_directories(copying)
        file = self.folder / path
        make_directories(file.parent)
        write_atomic(file, data, temporary=copying / f".{threading.get_ident()}")

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder."""
        refuse_links_on_path(self.folder, folder)
        root = self.folder / folder
        files = (Path(at) / name for at, _, names in os.walk(root) for name in names)
        return {file.relative_to(root).as_posix(): file.lstat().st_size for file in files}

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""
        refuse_links_on_path(self.folder, path)
        found = self.folder / path
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)
        if found.parent.is_dir():
            sync(found.parent)


class UrlTarget(FsspecStorage):
    """A folder of an object store, or of any other storage that fsspec can write to."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file; object stores show it only once it is complete."""

        def write(fs: Any, full: str) -> None:
            fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
            fs.pipe_file(full, data)

        self._with_retries(path, write)

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder."""

        def find(fs: Any, full: str) -> dict[str, int]:
            fs.invalidate_cache()
            found = fs.find(full, detail=True)
            root = f"{fs._strip_protocol(full)}/"
            paths = {name.removeprefix(root): info["size"] for name, info in found.items()}
            return {path: size for path, size in paths.items() if is_inside(path)}

        try:
            return self._with_retries(folder, find)
        except FileNotFoundError:
            return {}

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""

        def remove(fs: Any, full: str) -> None:
            fs.invalidate_cache()
            if fs.exists(full):
                fs.rm(full, recursive=True)

        self._with_retries(path, remove)
