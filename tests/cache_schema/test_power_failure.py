"""What a power failure would leave: everything that is published was synced before.

The page cache outlives a killed process, so kills cannot show this. Here every `fsync` is recorded
with what the file or folder held at that moment, and only that counts as being on the disk.
"""

import os
import stat
from pathlib import Path

import pytest

import cache_schema.durable
from cache_schema import StoreReader, StoreWriter
from cache_schema.upkeep.copy import copy_store
from cache_schema.upkeep.drop import drop_clips
from cache_schema.upkeep.merge import merge_stores
from tests.fingerprints import fingerprint_of

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="reads what a descriptor holds through /proc"
)


class Disk:
    """What was synced, by inode: a file's bytes, or the inodes a folder lists by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.synced: dict[int, bytes | dict[str, int]] = {}
        self.not_synced: list[str] = []
        self._fsync, self._rename = os.fsync, os.rename

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        self.synced[status.st_ino] = (
            self._listing(path) if stat.S_ISDIR(status.st_mode) else path.read_bytes()
        )

    def rename(self, source, target, **options) -> None:
        source, target = Path(source), Path(target)
        # Zarr too renames its files; those lie in the staged group and are checked with the shard.
        if source.is_file() and ".staging" not in target.parts:
            self._check_content(source, f"renamed to {target}")
        if target.parent.name == "commits":
            self.check_shard(target.stem, f"recorded by {target.name}")
        self._rename(source, target, **options)

    def check_shard(self, shard: str, when: str) -> None:
        """Note every file of a shard's newest group that a power failure could take away."""
        store = next(path.parent for path in self.root.rglob("store.json") if path.is_file())
        groups = sorted((store / "shards").glob(f"{shard}*"), key=lambda path: path.stat().st_mtime)
        for file in groups[-1].rglob("*"):
            if file.is_file():
                self.check_file(file, when)

    def check_file(self, file: Path, when: str) -> None:
        """Note the file if its bytes, or its name in a folder above it, are not on the disk."""
        self._check_content(file, when)
        while file != self.root:
            listed = self.synced.get(file.parent.stat().st_ino, {})
            if not isinstance(listed, dict) or listed.get(file.name) != file.stat().st_ino:
                self.not_synced.append(f"{file.parent} lists {file.name}, {when}")
            file = file.parent

    def check_store(self, store: Path) -> None:
        """Note whatever of a finished store could be lost."""
        for file in [store / "store.json", *store.glob("commits/*"), *store.glob("shards/**/*")]:
            if file.is_file():
                self.check_file(file, "at the end")

    def _check_content(self, file: Path, when: str) -> None:
        if self.synced.get(file.stat().st_ino) != file.read_bytes():
            self.not_synced.append(f"bytes of {file}, {when}")

    @staticmethod
    def _listing(folder: Path) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(folder)}


@pytest.fixture
def disk(tmp_path, monkeypatch):
    made = Disk(tmp_path)
    monkeypatch.setattr(os, "fsync", made.fsync)
    monkeypatch.setattr(os, "rename", made.rename)
    monkeypatch.setattr(os, "replace", made.rename)
    # One call for a whole file system, which is not seen here; without it every folder is synced.
    monkeypatch.setattr(cache_schema.durable, "_sync_file_system", lambda path: False)
    return made


@pytest.fixture
def written(tmp_path, disk, settings, write_shard):
    writer = StoreWriter.open(tmp_path / "cache", settings, provenance={})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    write_shard(writer, "00001", ["b0"])
    writer.write_index()
    return writer.path


def test_a_clip_is_on_the_disk_when_it_is_staged(tmp_path, disk, settings, clip_of):
    writer = StoreWriter.open(tmp_path / "cache", settings, provenance={})
    with writer.shard("00000", source="a.tar") as shard:
        shard.add("a0", clip_of("a0"), fingerprint=fingerprint_of("a0"))
        shard.skip("a1", "too_short", "3 frames", fingerprint=fingerprint_of("a1"))
        staged = writer.path / ".staging" / "00000"
        records = sorted((staged / "records").glob("*.json"))
        assert len(records) == 2
        chunks = [file for file in (staged / "shard").rglob("*") if "c" in file.parts[-6:]]
        for file in (*records, *(chunk for chunk in chunks if chunk.is_file())):
            disk.check_file(file, "when add or skip returned")
    assert disk.not_synced == []


def test_a_shard_is_on_the_disk_before_its_record_and_the_record_at_the_end(written, disk):
    disk.check_store(written)
    assert disk.not_synced == []


def test_a_shard_that_lost_a_clip_is_on_the_disk_before_its_record(written, disk):
    drop_clips(written, ["a1"], detail="a cut")
    assert StoreReader(written).keys == ("a0", "a2", "b0")
    disk.check_store(written)
    assert disk.not_synced == []


def test_merged_and_copied_stores_are_on_the_disk(written, disk, tmp_path):
    merge_stores(tmp_path / "merged" / written.name, [written])
    disk.check_store(tmp_path / "merged" / written.name)
    copy_store(written, tmp_path / "copied" / written.name)
    disk.check_store(tmp_path / "copied" / written.name)
    assert disk.not_synced == []


@pytest.mark.parametrize("what", ["files", "folders"])
def test_a_sync_that_does_nothing_is_found_out(tmp_path, settings, write_shard, monkeypatch, what):
    disk = Disk(tmp_path)

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (what == "files"):
            disk.fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", disk.rename)
    write_shard(StoreWriter.open(tmp_path, settings, provenance={}), "00000", ["a0"])
    assert disk.not_synced
