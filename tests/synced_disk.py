"""A disk that holds what was synced and nothing else, for tests of what a power failure leaves.

Every `fsync` is recorded with what the file or folder held at that moment; a rename publishes. The
page cache outlives a killed process, so killing one shows nothing of this.
"""

import os
import stat
from pathlib import Path

import pytest

import cache_schema.atomic_io


class SyncedDisk:
    """What was synced below `root`, by inode: a file's bytes, or a folder's names and inodes.

    `not_synced` lists what a power failure could have taken away at a moment when it was checked.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.synced: dict[int, bytes | dict[str, int]] = {}
        self.not_synced: list[str] = []
        self._fsync, self._rename = os.fsync, os.rename

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)
        monkeypatch.setattr(os, "replace", self.rename)
        # One call for a whole file system, which is not seen here; without it folders are synced.
        monkeypatch.setattr(cache_schema.atomic_io, "_sync_file_system", lambda path: False)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        self.synced[status.st_ino] = (
            {entry.name: entry.inode() for entry in os.scandir(path)}
            if stat.S_ISDIR(status.st_mode)
            else path.read_bytes()
        )

    def rename(self, source, target, **options) -> None:
        source, target = Path(source), Path(target)
        # Zarr too renames its files; those lie in the staged group and are checked with the shard.
        if source.is_file() and ".staging" not in target.parts:
            self._check_content(source, f"renamed to {target}")
        self.before_publishing(target)
        self._rename(source, target, **options)

    def before_publishing(self, target: Path) -> None:
        """Check what must be on the disk before a file is renamed to `target`."""

    def check_tree(self, folder: Path, when: str) -> None:
        """Check a file, or every file below a folder."""
        files = [folder] if folder.is_file() else [f for f in folder.rglob("*") if f.is_file()]
        assert files, f"nothing to check in {folder}"
        for file in files:
            self.check_file(file, when)

    def check_file(self, file: Path, when: str) -> None:
        """Note the file if its bytes, or its name in a folder above it, are not on the disk."""
        self._check_content(file, when)
        while file != self.root:
            listed = self.synced.get(file.parent.stat().st_ino, {})
            if not isinstance(listed, dict) or listed.get(file.name) != file.stat().st_ino:
                self.not_synced.append(f"{file.parent} lists {file.name}, {when}")
            file = file.parent

    def _check_content(self, file: Path, when: str) -> None:
        if self.synced.get(file.stat().st_ino) != file.read_bytes():
            self.not_synced.append(f"bytes of {file}, {when}")
