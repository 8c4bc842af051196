"""The index: derived from commit records; a wrong or missing one is harmless."""

import tracemalloc
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import (
    ClipEntry,
    SkippedClip,
    StoredArray,
    StoreReader,
    StoreSettings,
    StoreWriter,
)
from cache_schema import (
    index as clip_index,
)
from cache_schema.index import ClipIndex, index_of_records, load_index, read_index
from cache_schema.index_building import DuplicateKey, merged_columns
from cache_schema.index_columns import DamagedIndex, write_columns
from cache_schema.maintenance.drop import drop_clips
from cache_schema.names import StoreLayout
from cache_schema.packed_strings import PackedText
from cache_schema.records import CommitRecord, committed_shards, parse_commit
from cache_schema.storage import LocalStorage
from tests.cache_schema.made_stores import SETTINGS, clip_of, write_shard
from tests.fingerprints import fingerprint_of

Arrays = dict[str, np.ndarray]
Records = list[tuple[CommitRecord, int]]


def _record(shard: str, keys: list[str], generation: int, skipped: list[str]) -> CommitRecord:
    clips = []
    for index, key in enumerate(keys):
        size = 1 + (crc32(key.encode()) + generation) % 2**40
        arrays = {
            "a": StoredArray("", size, f"{crc32(key.encode()):08x}", f"{size % 7:08x}"),
            "b": StoredArray("", size + 1, f"{generation:08x}", f"{size % 5:08x}"),
        }
        made_from = fingerprint_of(f"{key} {generation}")
        clips.append(ClipEntry(key, shard, index, f"{shard}.tar", made_from, {}, arrays))
    left_out = tuple(
        SkippedClip(key, "too_short", f"{key}!", fingerprint_of(key), shard) for key in skipped
    )
    return CommitRecord(
        shard, generation, generation // 2, f"{shard}.tar", tuple(clips), left_out, {}
    )


@st.composite
def all_records(draw: st.DrawFn) -> Records:
    names = draw(st.lists(st.sampled_from("0123456789"), unique=True, max_size=6))
    texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
    keys = draw(st.lists(texts, unique=True, max_size=25))
    records = []
    for number, name in enumerate(sorted(names)):
        own = keys[number :: len(names)]
        skipped = draw(st.lists(texts, max_size=3))
        records.append((_record(name, own, draw(st.integers(0, 2)), skipped), number * 7))
    return records


@given(all_records(), st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_an_index_brought_up_to_date_is_the_one_made_anew(
    records: Records, old: set[int], kept: set[int]
) -> None:
    def chosen(numbers: set[int]) -> Records:
        return [record for record in records if int(record[0].shard) in numbers]

    before = ClipIndex.from_records(chosen(old), ("a", "b"))
    newer = ClipIndex.from_records(
        [record for record in records if int(record[0].shard) not in old & kept], ("a", "b")
    )
    mask = np.array([int(name) in kept for name in before.shard_names], bool)
    columns = merged_columns(before.columns, mask, newer.columns)
    expected = ClipIndex.from_records(records, ("a", "b"))
    assert ClipIndex(columns, ("a", "b")) == expected
    for record, crc32c in records:
        facts = expected.shards[record.shard]
        assert (facts.generation, facts.num_clips) == (record.generation, len(record.clips))
        assert facts.num_bytes == sum(x.bytes for c in record.clips for x in c.arrays.values())
        assert expected.record_crc32c(record.shard) == crc32c
        for clip in record.clips:
            row = expected.keys.index(clip.key)
            assert expected.locate(row) == (record.shard, record.group, clip.index)
            for name, stored in clip.arrays.items():
                assert expected.file_facts(row, name) == (
                    stored.bytes,
                    int(stored.crc32c, 16),
                    int(stored.table_crc32c, 16),
                )
    assert list(expected.all_skipped()) == [c for record, _ in records for c in record.skipped]


def test_a_key_in_two_shards_is_refused_wherever_it_comes_from() -> None:
    twins = [(_record(shard, ["a", "k" + shard, "twin"], 0, []), 0) for shard in "xy"]
    with pytest.raises(DuplicateKey, match="'a' is in shards 'x' and 'y'"):
        ClipIndex.from_records(twins, ("a", "b"))
    one, other = (ClipIndex.from_records([twin], ("a", "b")) for twin in twins)
    with pytest.raises(DuplicateKey, match="'a' is in shards 'x' and 'y'"):
        merged_columns(one.columns, np.array([True]), other.columns)


def _from_records(store: Path) -> ClipIndex:
    shards = committed_shards(StoreLayout(store))
    return index_of_records(LocalStorage(store), SETTINGS, shards)


def test_the_index_on_disk_is_the_one_made_from_records(indexed: Path) -> None:
    assert read_index(LocalStorage(indexed), SETTINGS) == _from_records(indexed)
    with np.load(indexed / "index.npz", allow_pickle=False) as file:
        assert bytes(file["settings_hash"]).decode() == SETTINGS.hash
        assert bytes(file["keys.text"]) == b"a0a1a2b0b1"
        assert file["clips.shard"].tolist() == [0, 0, 0, 1, 1]


def test_the_index_depends_on_the_records_and_the_store_file_alone(
    indexed: Path, tmp_path: Path
) -> None:
    before = (indexed / "index.npz").stat()
    StoreWriter.open(indexed.parent, SETTINGS, provenance={}).write_index()
    assert (indexed / "index.npz").stat().st_mtime_ns == before.st_mtime_ns
    provenance = StoreReader(indexed).provenance
    writer = StoreWriter.open(tmp_path / "elsewhere", SETTINGS, provenance=provenance)
    write_shard(writer, "00001", ["b0", "b1"])
    writer.write_index()
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    writer.write_index()
    assert (writer.path / "index.npz").read_bytes() == (indexed / "index.npz").read_bytes()


def test_what_a_writer_knows_does_not_stand_in_for_records_that_came_since(indexed: Path) -> None:
    known = load_index(LocalStorage(indexed), SETTINGS)
    writer = StoreWriter.open(indexed.parent, SETTINGS, provenance={})
    drop_clips(indexed, ["a1"], detail="")
    write_shard(writer, "00002", ["c0"])
    writer.write_index(known)
    assert read_index(LocalStorage(indexed), SETTINGS) == _from_records(indexed)


def _assert_reads_the_same(store: Path) -> None:
    reader = StoreReader(store)
    assert load_index(LocalStorage(store), SETTINGS) == _from_records(store)
    for key in reader.keys:
        np.testing.assert_array_equal(reader.read(key)["mask"], clip_of(key)["mask"])


def test_a_stale_index_is_harmless(indexed: Path) -> None:
    stale = (indexed / "index.npz").read_bytes()
    write_shard(StoreWriter.open(indexed.parent, SETTINGS, provenance={}), "0000", ["a9", "c"])
    _assert_reads_the_same(indexed)
    assert StoreReader(indexed).keys == ("a0", "a1", "a2", "a9", "b0", "b1", "c")
    drop_clips(indexed, ["a1", "c"], detail="blurred")
    (indexed / "index.npz").write_bytes(stale)
    _assert_reads_the_same(indexed)
    assert StoreReader(indexed).keys == ("a0", "a2", "a9", "b0", "b1")


def test_a_missing_index_is_harmless(indexed: Path) -> None:
    (indexed / "index.npz").unlink()
    _assert_reads_the_same(indexed)


def test_a_damaged_index_is_harmless_and_known_for_damaged(indexed: Path) -> None:
    path = indexed / "index.npz"
    good, place = path.read_bytes(), LocalStorage(indexed)
    expected = read_index(place, SETTINGS)
    for position in range(0, len(good), 17):
        data = bytearray(good)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(data)
        try:
            assert read_index(place, SETTINGS) == expected
        except DamagedIndex:
            assert load_index(place, SETTINGS) == expected
    for size in (*range(0, len(good), 97), len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DamagedIndex):
            read_index(place, SETTINGS)
    _assert_reads_the_same(indexed)
    StoreWriter.open(indexed.parent, SETTINGS, provenance={}).write_index()
    assert path.read_bytes() == good


def test_an_index_of_another_store_is_not_taken(indexed: Path, tmp_path: Path) -> None:
    other = StoreSettings(kind="teacher", arrays=SETTINGS.arrays, values={"other": 1})
    writer = StoreWriter.open(tmp_path / "other", other, provenance={})
    with writer.shard("00000", source="s") as shard:
        shard.add("wrong", clip_of("wrong"), fingerprint=fingerprint_of("wrong"))
        shard.commit()
    writer.write_index()
    (indexed / "index.npz").write_bytes((writer.path / "index.npz").read_bytes())
    with pytest.raises(DamagedIndex, match="other settings"):
        read_index(LocalStorage(indexed), SETTINGS)
    _assert_reads_the_same(indexed)


def test_only_records_that_the_index_does_not_have_are_read(
    indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    original = parse_commit

    def parse(data: bytes, of: StoreSettings, shard: str, **names: str) -> CommitRecord:
        parsed.append(shard)
        return original(data, of, shard, **names)

    monkeypatch.setattr(clip_index, "parse_commit", parse)
    assert len(StoreReader(indexed)) == 5
    assert parsed == []
    write_shard(StoreWriter.open(indexed.parent, SETTINGS, provenance={}), "00002", ["c0"])
    assert len(StoreReader(indexed)) == 6
    assert parsed == ["00002"]


def _large_index(indexed: Path, keys: PackedText) -> Arrays:
    """Columns with these keys, in all else like the first clip of a store."""
    columns = dict(read_index(LocalStorage(indexed), SETTINGS).columns)
    for name in columns:
        if name.startswith(("clips.", "arrays.")):
            columns[name] = np.repeat(columns[name][:1], len(keys))
    return columns | {"keys.text": keys.blob, "keys.ends": keys.ends}


def test_opening_takes_little_more_memory_than_the_file(indexed: Path) -> None:
    keys = PackedText.from_strings(f"{row // 1000:05d}/clip-{row:08d}" for row in range(100_000))
    columns = _large_index(indexed, keys)
    with (indexed / "index.npz").open("wb") as file:
        write_columns(file, columns, SETTINGS, 0)
    del columns
    tracemalloc.start()
    try:
        assert read_index(LocalStorage(indexed), SETTINGS).keys == keys
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * (indexed / "index.npz").stat().st_size


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        ("key", "leaves its folder"),
        ("order", "not in order"),
        ("character", "utf-8|inside a character"),
        ("fingerprint", "not a fingerprint"),
    ],
)
def test_every_row_of_a_large_index_is_checked(
    indexed: Path, fault: str, message: str | None
) -> None:
    texts = [f"{row:05d}é" for row in range(40_000)]
    if fault == "key":
        texts[20_000] += "/.."
    elif fault == "order":  # and within each of the blocks they are
        texts[16_384:32_768] = [f"1{text}" for text in texts[16_384:32_768]]
    columns = _large_index(indexed, PackedText.from_strings(texts))
    if fault == "character":
        columns["keys.ends"][16_383] -= 1
    elif fault == "fingerprint":
        columns["clips.fingerprint"][39_999] = b"F" * 32
    with (indexed / "index.npz").open("wb") as file:
        write_columns(file, columns, SETTINGS, 0)
    if message is None:
        assert read_index(LocalStorage(indexed), SETTINGS).keys == texts
    else:
        with pytest.raises(DamagedIndex, match=message):
            read_index(LocalStorage(indexed), SETTINGS)
