"""Fingerprints of clips: written, indexed, and kept by copy, merge and drop."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_schema import StoreReader, StoreWriter, verify_store
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import change_fingerprints, drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.made_stores import SETTINGS, clip_of
from tests.fingerprints import fingerprint_of


def _assert_kept(store: Path) -> None:
    """Every clip has its own, in the index, in the records, and without an index."""
    for _ in range(2):
        reader = StoreReader(store)
        wanted = [fingerprint_of(key).encode() for key in reader.keys]
        assert reader.fingerprints.dtype == np.dtype("S32")
        assert reader.fingerprints.tolist() == wanted
        assert [reader.record(key).fingerprint.encode() for key in reader.keys] == wanted
        for clip in reader.skipped:
            assert clip.fingerprint == fingerprint_of(clip.key)
        (store / "index.npz").unlink(missing_ok=True)
    assert verify_store(store).problems == ()


def test_it_is_written_with_the_clip(indexed: Path) -> None:
    _assert_kept(indexed)


def test_a_dropped_clip_keeps_it(indexed: Path) -> None:
    drop_clips(indexed, ["a1"], detail="blurred")
    (dropped,) = (clip for clip in StoreReader(indexed).skipped if clip.reason == "dropped")
    assert dropped.fingerprint == fingerprint_of("a1")
    drop_clips(indexed, ["a1"], detail="again", reason="redo")
    _assert_kept(indexed)


def test_a_damaged_clip_keeps_it(indexed: Path) -> None:
    (indexed / "shards/00000/features/c.1.0.0.0.0").write_bytes(b"damaged")
    (damaged,) = repair_store(indexed).clips
    assert damaged.fingerprint == fingerprint_of("a1")
    _assert_kept(indexed)


def test_a_merged_clip_keeps_it(indexed: Path, tmp_path: Path) -> None:
    merge_stores(tmp_path / "merged" / indexed.name, [indexed])
    _assert_kept(tmp_path / "merged" / indexed.name)


def test_a_copied_clip_keeps_it(indexed: Path, tmp_path: Path) -> None:
    copy_store(indexed, tmp_path / "copied" / indexed.name)
    _assert_kept(tmp_path / "copied" / indexed.name)


def test_others_can_be_written_and_nothing_else_changes(indexed: Path) -> None:
    other = fingerprint_of("another source")
    before = StoreReader(indexed)
    entries = {key: before.record(key) for key in before.keys}
    wanted = {"a1": other, "b0": fingerprint_of("b0"), "nowhere": other}
    assert change_fingerprints(indexed, wanted) == 1
    assert change_fingerprints(indexed, wanted) == 0
    after = StoreReader(indexed)
    assert after.skipped == before.skipped
    for key in entries:
        entry = after.record(key)
        assert entry == replace(
            entries[key], fingerprint=other if key == "a1" else entry.fingerprint
        )
        for name, values in after.read(key).items():
            assert (values == clip_of(key)[name]).all()
    assert [after.shards[name].generation for name in ("00000", "00001")] == [1, 0]
    assert verify_store(indexed).problems == ()


def test_shards_with_other_fingerprints_are_not_the_same_shard(
    indexed: Path, tmp_path: Path
) -> None:
    other = StoreWriter.open(tmp_path / "other", SETTINGS, provenance={})
    with other.shard("00001", source="00001.tar") as shard:
        for key in ("b0", "b1"):
            named = {"source_fps": 29.97, "name": key}
            shard.add(key, clip_of(key), named, fingerprint=fingerprint_of(f"another {key}"))
        shard.commit()
    target = shutil.copytree(indexed, tmp_path / "target" / indexed.name)
    with pytest.raises(ValueError, match="other shards of the same names"):
        merge_stores(target, [other.path])


@pytest.mark.parametrize(
    "wrong", ["", "ab", "AB" * 16, "g0" * 16, "ab" * 16 + "\n", "ab" * 17, None, 7, b"ab" * 16]
)
def test_nothing_else_is_taken_for_one(tmp_path: Path, wrong: object) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("0", source="0.tar") as shard:
        with pytest.raises(ValueError, match="32 lower-case hexadecimal digits"):
            shard.add("a", clip_of("a"), fingerprint=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="32 lower-case hexadecimal digits"):
            shard.skip("a", "too_short", "", fingerprint=wrong)  # type: ignore[arg-type]
        assert not shard.has("a")
