"""Where a copy of a store is written: a local folder, or a URL; used by `copy` alone."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol

from cache_schema.durable import make_directories, sync, write_whole
from cache_schema.places import FsspecPlace, LocalPlace, Place, is_url
from cache_schema.symlinks import refuse_links_on_the_way

COPYING = ".staging/.copy"
"""What a copy keeps in its target until it is done; no shard can have that name."""


def is_inside(path: str) -> bool:
    """Whether a path that a listing gave stays inside the folder it is relative to."""
    return not path.startswith("/") and not {"", ".", ".."} & set(path.split("/"))


class Target(Place, Protocol):
    """A place that files can be put to; a file is whole or absent."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file, with the folders it lies in, over one that is there."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder, by path relative to it; none if it does not exist."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds, if it is there."""


def open_target(where: Path | str) -> Target:
    """The target at a local path or a URL; nothing is asked of it yet.

    Raises `ValueError` for a web server, which cannot be written to.
    """
    if isinstance(where, str) and is_url(where):
        if where.startswith(("http://", "https://")):
            raise ValueError(
                f"{where} is on a web server, which takes no files; copy to the folder that it "
                "serves, or to an object store such as s3://bucket/cache"
            )
        return UrlTarget(where)
    return FolderTarget(Path(where))


class FolderTarget(LocalPlace):
    """A local folder; what is put there is on the disk when `put` returns."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file by way of a temporary one."""
        refuse_links_on_the_way(self.folder, path)
        refuse_links_on_the_way(self.folder, COPYING)
        copying = self.folder / COPYING
        make_directories(copying)
        file = self.folder / path
        make_directories(file.parent)
        write_whole(file, data, temporary=copying / f".{threading.get_ident()}")

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder."""
        refuse_links_on_the_way(self.folder, folder)
        root = self.folder / folder
        files = (Path(at) / name for at, _, names in os.walk(root) for name in names)
        return {file.relative_to(root).as_posix(): file.lstat().st_size for file in files}

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds, if it is there."""
        refuse_links_on_the_way(self.folder, path)
        found = self.folder / path
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)
        if found.parent.is_dir():
            sync(found.parent)


class UrlTarget(FsspecPlace):
    """A folder of an object store, or of anything else that fsspec writes to."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file; object stores show it when all of it has arrived."""

        def write(fs: Any, full: str) -> None:
            fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
            fs.pipe_file(full, data)

        self._ask(path, write)

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder."""

        def find(fs: Any, full: str) -> dict[str, int]:
            fs.invalidate_cache()
            found = fs.find(full, detail=True)
            root = f"{fs._strip_protocol(full)}/"
            paths = {name.removeprefix(root): info["size"] for name, info in found.items()}
            return {path: size for path, size in paths.items() if is_inside(path)}

        try:
            return self._ask(folder, find)
        except FileNotFoundError:
            return {}

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds, if it is there."""

        def remove(fs: Any, full: str) -> None:
            fs.invalidate_cache()
            if fs.exists(full):
                fs.rm(full, recursive=True)

        self._ask(path, remove)
