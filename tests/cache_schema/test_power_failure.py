"""Durability at a power failure: everything that is published was synced before.

The page cache outlives a killed process, so kills cannot show this.
"""

import os
import stat
from pathlib import Path

import pytest

from cache_schema import StoreReader, StoreWriter
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from tests.cache_schema.made_stores import SETTINGS, clip_of, write_shard
from tests.fingerprints import fingerprint_of
from tests.synced_disk import SyncedDisk

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="reads what a descriptor holds through /proc"
)


class StoreDisk(SyncedDisk):
    """Checks a shard before its commit record is published."""

    def before_publishing(self, target: Path) -> None:
        if target.parent.name != "commits":
            return
        groups = (target.parents[1] / "shards").glob(f"{target.stem}*")
        newest = max(groups, key=lambda path: path.stat().st_mtime_ns)
        self.check_tree(newest, f"recorded by {target.name}")

    def check_store(self, store: Path) -> None:
        """Note whatever of a finished store could be lost."""
        for part in ("store.json", "commits", "shards"):
            self.check_tree(store / part, "at the end")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    made = StoreDisk(tmp_path)
    made.watch(monkeypatch)
    return made


@pytest.fixture
def written(tmp_path, disk):
    writer = StoreWriter.open(tmp_path / "cache", SETTINGS, provenance={})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    write_shard(writer, "00001", ["b0"])
    writer.write_index()
    return writer.path


def test_a_clip_is_on_the_disk_when_it_is_staged(tmp_path, disk):
    writer = StoreWriter.open(tmp_path / "cache", SETTINGS, provenance={})
    with writer.shard("00000", source="a.tar") as shard:
        shard.add("a0", clip_of("a0"), fingerprint=fingerprint_of("a0"))
        shard.skip("a1", "too_short", "3 frames", fingerprint=fingerprint_of("a1"))
        (staged,) = writer.path.glob(".staging/00000/*/staged")
        records = sorted((staged / "records").glob("*.json"))
        assert len(records) == 2
        chunks = (staged / "shard").rglob("c.*")
        for file in (*records, *chunks):
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
def test_a_sync_that_does_nothing_is_found_out(tmp_path, monkeypatch, what):
    disk = StoreDisk(tmp_path)

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (what == "files"):
            disk.fsync(descriptor)

    disk.watch(monkeypatch)
    monkeypatch.setattr(os, "fsync", fsync)
    write_shard(StoreWriter.open(tmp_path, SETTINGS, provenance={}), "00000", ["a0"])
    assert disk.not_synced
