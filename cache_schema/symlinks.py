"""No symbolic links inside a store that is changed: what is written or removed must lie in it.

The store's folder itself may be reached through one. Readers follow links, to regular files only,
and compare what they find with its checksums.
"""

import os
from pathlib import Path

from cache_schema.errors import SymlinkInStore
from cache_schema.layout import StoreLayout


def refuse_links(layout: StoreLayout) -> None:
    """`SymlinkInStore` if the store's folders, or what lies directly in them, are links."""
    for folder in (
        layout.root,
        layout.shards,
        layout.commits,
        layout.staging,
        layout.quarantine,
    ):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    _refuse(entry)


def refuse_links_below(folder: Path) -> None:
    """`SymlinkInStore` if anything below a folder is a link."""
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(at) / name).is_symlink():
                raise _error(Path(at) / name)


def refuse_links_on_the_way(root: Path, path: str) -> None:
    """`SymlinkInStore` if anything from `root` to `path`, `path` included, is a link."""
    at = root
    for part in Path(path).parts:
        at /= part
        if at.is_symlink():
            raise _error(at)


def _refuse(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        raise _error(Path(entry.path))


def _error(path: Path) -> SymlinkInStore:
    return SymlinkInStore(
        f"{path} is a symbolic link, through which something outside the store would be changed; "
        "put the files themselves there, or remove the link"
    )
