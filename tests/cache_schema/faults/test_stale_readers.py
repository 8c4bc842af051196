"""Readers that stay open while a store is repaired and filled again, as in a long training."""

from pathlib import Path

import pytest

from cache_schema import CorruptClip, StoreReader, StoreWriter
from cache_schema.upkeep.repair import repair_store
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    SHARDS,
    assert_equals_the_clip,
    clip_of,
    write_all,
)
from tests.fingerprints import fingerprint_of


def _open_and_read(store: Path) -> StoreReader:
    reader = StoreReader(store)
    for key in reader.keys:
        assert_equals_the_clip(reader, key)
    return reader


def test_a_clip_that_a_repair_took_out_says_that_the_store_has_changed(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    (store / "shards" / "00000" / "mask" / "c" / "1" / "0" / "0").write_bytes(b"")
    repair_store(store)
    for key in SHARDS["00000"]:
        with pytest.raises(CorruptClip, match="open it again"):
            reader.read(key)
    for key in SHARDS["00001"]:
        assert_equals_the_clip(reader, key)


def test_a_shard_made_again_with_other_clips_is_never_misread(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    record = store / "commits" / "00000.json"
    record.write_bytes(record.read_bytes()[:-5])
    assert repair_store(store).shards == ("00000",)
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("00000", source="00000.tar") as shard:
        for key in SHARDS["00000"][1:]:
            shard.add(key, clip_of(key), fingerprint=fingerprint_of(key))
        shard.skip(
            SHARDS["00000"][0],
            "undecodable",
            "it no longer decodes",
            fingerprint=fingerprint_of(SHARDS["00000"][0]),
        )
        shard.commit()
    for key in SHARDS["00000"]:
        try:
            assert_equals_the_clip(reader, key)
        except CorruptClip:
            continue
