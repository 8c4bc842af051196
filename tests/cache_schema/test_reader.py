"""Reading a store by key: values, refusals and error messages."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import (
    ArraySpec,
    ClipMissing,
    CorruptClip,
    CorruptRecord,
    SettingsMismatch,
    ShardFacts,
    SkippedClip,
    StoreReader,
    StoreSettings,
    StoreWriter,
)
from cache_schema.maintenance.drop import drop_clips
from tests.cache_schema.made_stores import SETTINGS, clip_of, write_shard
from tests.fingerprints import fingerprint_of

CHUNK = "shards/00000/features/c.1.0.0.0.0"


def test_every_clip_is_read_back_by_key(store: Path) -> None:
    reader = StoreReader(store, kind="teacher")
    assert reader.keys == ("a0", "a1", "a2", "b0", "b1")
    assert len(reader) == 5
    for key in reader.keys:
        found = reader.read(key)
        expected = clip_of(key)
        assert list(found) == ["features", "mask"]
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, strict=True)


def test_records_say_where_a_clip_came_from(store: Path) -> None:
    reader = StoreReader(store)
    entry = reader.record("b1")
    assert (entry.key, entry.shard, entry.index, entry.source) == ("b1", "00001", 1, "00001.tar")
    assert entry.attributes == {"source_fps": 29.97, "name": "b1"}
    assert [clip.key for clip in reader.records("00000")] == ["a0", "a1", "a2"]
    assert reader.provenance == {"version": "1.2.3"}
    assert reader.skipped == (
        SkippedClip("a3", "too_short", "12 frames, 49 needed", fingerprint_of("a3"), "00000"),
    )
    assert reader.name == store.name
    with pytest.raises(KeyError):
        reader.records("00002")


def test_shards_are_known_with_their_sizes(store: Path) -> None:
    reader = StoreReader(store)
    sizes = {
        shard: sum(
            path.stat().st_size for path in store.glob(f"shards/{shard}/*/c.*") if path.is_file()
        )
        for shard in ("00000", "00001")
    }
    assert list(reader.shards.values()) == [
        ShardFacts("00000", "00000.tar", 0, 0, 3, sizes["00000"]),
        ShardFacts("00001", "00001.tar", 0, 0, 2, sizes["00001"]),
    ]
    assert list(reader.shards) == ["00000", "00001"]
    assert reader.num_bytes == sum(sizes.values())


def test_a_reader_of_some_shards_reads_their_records_alone(store: Path) -> None:
    StoreWriter.open(store.parent, SETTINGS, provenance={}).write_index()
    (store / "index.npz").write_bytes(b"no index")
    (store / "commits" / "00000.json").write_bytes(b"no record")
    reader = StoreReader(store, shards=["00001", "00002"])
    assert reader.keys == ("b0", "b1")
    assert list(reader.shards) == ["00001"]
    assert reader.shard_numbers.tolist() == [0, 0]
    assert reader.skipped_by_key == {}
    np.testing.assert_array_equal(reader.read("b1")["mask"], clip_of("b1")["mask"])
    with pytest.raises(CorruptRecord):
        _ = StoreReader(store, shards=["00000"]).keys


def test_what_was_skipped_is_found_by_key(store: Path) -> None:
    reader = StoreReader(store)
    assert reader.skipped_by_key == {"a3": list(reader.skipped)}
    assert [list(reader.shards)[n] for n in reader.shard_numbers] == [
        reader.shard_of(key) for key in reader.keys
    ]


def test_where_a_clip_lies_is_known_without_its_record(store: Path) -> None:
    StoreWriter.open(store.parent, SETTINGS, provenance={}).write_index()
    path = store / "commits" / "00001.json"
    path.write_bytes(path.read_bytes()[:22])
    reader = StoreReader(store)
    assert [reader.shard_of(key) for key in reader.keys] == ["00000"] * 3 + ["00001"] * 2
    np.testing.assert_array_equal(reader.read("b1")["mask"], clip_of("b1")["mask"])
    with pytest.raises(CorruptRecord, match=r"commit record .*00001\.json ") as error:
        reader.record("b1")
    assert error.value.remedy == "repair"


def test_keys_come_in_the_order_of_their_code_points(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    write_shard(writer, "1", ["b", "ä", "\U0001f600", "A/2"])
    write_shard(writer, "0", ["a", "￮", "A/10"])
    reader = StoreReader(writer.path)
    assert reader.keys == ("A/10", "A/2", "a", "b", "ä", "￮", "\U0001f600")
    for key in reader.keys:
        np.testing.assert_array_equal(reader.read(key)["mask"], clip_of(key)["mask"])
        assert reader.record(key).key == key


def test_only_the_arrays_asked_for_are_read(store: Path) -> None:
    reader = StoreReader(store)
    assert list(reader.read("a0", ["mask"])) == ["mask"]
    for ask in (lambda: reader.read("a0", ["colour"]), lambda: reader.read_part("a0", "hue", 0, 1)):
        with pytest.raises(ValueError, match=r"no array (colour|hue); it holds features, mask"):
            ask()


@pytest.mark.parametrize("compression", ["none", "blosc-zstd-shuffle"])
def test_parts_equal_slices_of_the_whole(tmp_path: Path, compression: Any) -> None:
    spec = ArraySpec(
        dtype="float32",
        shape=(6, 300, 500),
        dimension_names=("t", "h", "w"),
        compression=compression,
    )
    settings = StoreSettings(kind="big", arrays={"frames": spec}, values={})
    values = np.random.default_rng(0).normal(size=spec.shape).astype("float32")
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    with writer.shard("s", source="s") as shard:
        shard.add("k", {"frames": values}, fingerprint=fingerprint_of("k"))
        shard.commit()
    reader = StoreReader(writer.path)
    for start in range(6):
        for stop in range(start + 1, 7):
            part = reader.read_part("k", "frames", start, stop)
            np.testing.assert_array_equal(part, values[start:stop], strict=True)
    for start, stop in ((0, 7), (-1, 2), (3, 3)):
        with pytest.raises(ValueError, match="not a part"):
            reader.read_part("k", "frames", start, stop)


def test_what_is_read_can_be_changed_without_changing_the_store(store: Path) -> None:
    reader = StoreReader(store)
    first = reader.read("a0")["features"]
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(reader.read("a0")["features"], expected)


def test_threads_can_share_a_reader(store: Path) -> None:
    reader = StoreReader(store)
    keys = [*reader.keys] * 40
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda key: reader.read(key)["features"], keys))
        entries = list(threads.map(reader.record, keys))
    for key, values, entry in zip(keys, found, entries, strict=True):
        np.testing.assert_array_equal(values, clip_of(key)["features"])
        assert entry.key == key


def test_a_missing_clip_names_kind_key_store_and_remedy(store: Path) -> None:
    reader = StoreReader(store)
    with pytest.raises(ClipMissing) as error:
        reader.read("walk/0017")
    message = str(error.value)
    assert "teacher of clip 'walk/0017'" in message
    assert str(store) in message
    assert error.value.remedy == "make"
    assert "walk/0017" not in reader
    for ask in (reader.record, reader.shard_of):
        with pytest.raises(KeyError):
            ask("walk/0017")


def test_a_skipped_clip_is_missing_with_its_reason(store: Path) -> None:
    reader = StoreReader(store)
    assert "a3" not in reader
    with pytest.raises(ClipMissing, match=r"skipped as too_short \(12 frames, 49 needed\)"):
        reader.read("a3")


def test_a_store_of_another_kind_is_refused(store: Path) -> None:
    with pytest.raises(SettingsMismatch, match="kind 'teacher', not 'latents'"):
        StoreReader(store, kind="latents")


def test_a_reader_keeps_to_the_clips_it_first_saw(store: Path) -> None:
    before = StoreReader(store)
    keys = list(before.keys)
    write_shard(StoreWriter.open(store.parent, SETTINGS, provenance={}), "00002", ["c0"])
    assert before.keys == keys
    assert StoreReader(store).keys == [*keys, "c0"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_replaced_since_opening_is_read_from_its_next_generation(
    store: Path, indexed: bool
) -> None:
    if indexed:
        StoreWriter.open(store.parent, SETTINGS, provenance={}).write_index()
    before = StoreReader(store)
    assert len(before) == 5
    drop_clips(store, ["a1"], detail="blurred")
    for key in ("a0", "a2", "b0"):
        for name, values in clip_of(key).items():
            np.testing.assert_array_equal(before.read(key)[name], values)
    np.testing.assert_array_equal(
        before.read_part("a2", "features", 0, 1), clip_of("a2")["features"][:1]
    )
    with pytest.raises(ClipMissing, match=r"'a1' .*since the store was opened.*\(blurred\)"):
        before.read("a1")
    # Its records are those of the shard as it is now.
    with pytest.raises(CorruptClip, match=r"changed since it was opened.*open it again"):
        before.record("a2")
    after = StoreReader(store)
    assert after.keys == ("a0", "a2", "b0", "b1")
    assert after.shards["00000"].generation == 1
    for key in after.keys:
        np.testing.assert_array_equal(after.read(key)["features"], clip_of(key)["features"])
        assert after.record(key).key == key
    assert ("a1", "dropped") in [(clip.key, clip.reason) for clip in after.skipped]


def test_files_exchanged_after_the_first_read_are_refused(store: Path) -> None:
    reader = StoreReader(store)
    reader.read("a1")
    shutil.copy(store / CHUNK.replace("/c.1.", "/c.0."), store / CHUNK)
    with pytest.raises(CorruptClip, match="is not the clip's"):
        reader.read("a1")


def test_a_shard_made_anew_since_opening_is_never_read_in_place_of_the_old_one(store: Path) -> None:
    before = StoreReader(store)
    np.testing.assert_array_equal(
        before.read_part("a1", "features", 0, 2), clip_of("a1")["features"][:2]
    )
    (store / "commits" / "00000.json").unlink()
    shutil.rmtree(store / "shards" / "00000")
    write_shard(StoreWriter.open(store.parent, SETTINGS, provenance={}), "00000", ["a1", "a2"])
    np.testing.assert_array_equal(before.read("a1")["features"], clip_of("a1")["features"])
    np.testing.assert_array_equal(
        before.read_part("a1", "features", 0, 2), clip_of("a1")["features"][:2]
    )
    with pytest.raises(ClipMissing, match="since the store was opened"):
        before.read("a0")


def test_zarrs_metadata_is_not_needed_for_reading(store: Path) -> None:
    for path in store.rglob("zarr.json"):
        path.unlink()
    reader = StoreReader(store)
    np.testing.assert_array_equal(reader.read("b1")["features"], clip_of("b1")["features"])
