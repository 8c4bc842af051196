"""The table of attributes against loops over the records, its updates, and its damage."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import ClipEntry, StoredArray, StoreReader, StoreWriter, verify_store
from cache_schema.attribute_building import TableBuilder
from cache_schema.attribute_table import COLUMNS, AttributeTable
from cache_schema.index import ClipIndex
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.repair import repair_store
from cache_schema.records import CommitRecord
from tests.cache_schema.made_stores import SETTINGS, clip_of
from tests.fingerprints import fingerprint_of

ATTRIBUTES = {
    "a0": {
        "quality": 0.25,
        "num_frames": 9,
        "valid_frames": 7,
        "lost_at": None,
        "caption": "Ein Löwe",
    },
    "a1": {"prompt": {"source": "dataset", "kinds": ["box", "points"], "confidence": None}},
    "b0": {"quality": 1, "caption": "", "prompt": {"source": "grounding", "confidence": 0.5}},
    "b1": {"caption": "Ein Löwe", "quality": "high", "num_frames": 2**60},
    "c0": {"quality": 0.75},
}
EXPECTED_NUMBERS = {
    "quality": {"a0": 0.25, "b0": 1.0},
    "num_frames": {"a0": 9.0},
    "valid_frames": {"a0": 7.0},
    "lost_at": {},
    "prompt.confidence": {"b0": 0.5},
}
EXPECTED_TEXTS = {
    "prompt.source": {"a1": "dataset", "b0": "grounding"},
    "prompt.kinds": {"a1": "box+points"},
    "caption": {"a0": "Ein Löwe", "b0": "", "b1": "Ein Löwe"},
}


def write_shard(writer, name, keys):
    with writer.shard(name, source=name) as shard:
        for key in keys:
            shard.add(key, clip_of(key), ATTRIBUTES[key], fingerprint=fingerprint_of(key))
        shard.commit()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    writer = StoreWriter.open(tmp_path / "cache", SETTINGS, provenance={})
    write_shard(writer, "00001", ["b1", "b0"])
    write_shard(writer, "00000", ["a0", "a1"])
    writer.write_index()
    writer.write_attributes()
    return writer.path


def values_of(reader):
    """Numbers and texts by name and key, without those that are not there."""
    listed, keys = reader.listed_attributes(), list(reader.keys)
    numbers = {
        name: {key: float(x) for key, x in zip(keys, column, strict=True) if not math.isnan(x)}
        for name, column in listed.numbers.items()
    }
    texts = {
        name: {key: text for row, key in enumerate(keys) if (text := column.of(row)) is not None}
        for name, column in listed.texts.items()
    }
    return numbers, texts


def test_the_columns_hold_what_the_records_say(store: Path) -> None:
    reader = StoreReader(store)
    assert values_of(reader) == (EXPECTED_NUMBERS, EXPECTED_TEXTS)
    assert not reader.listed_attributes().missing and not reader.listed_attributes().problem
    assert not verify_store(store).problems


def test_without_the_file_every_shard_is_missing(store: Path) -> None:
    (store / "attributes.npz").unlink()
    listed = StoreReader(store).listed_attributes()
    assert (listed.missing, listed.problem) == (("00000", "00001"), "")
    assert all(np.isnan(column).all() for column in listed.numbers.values())
    assert all(text.of(0) is None for text in listed.texts.values())


def test_a_shard_added_or_changed_since_is_missing(store: Path) -> None:
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    stale = (store / "attributes.npz").read_bytes()
    drop_clips(store, ["b0"], detail="a test")
    write_shard(writer, "00002", ["c0"])
    writer.write_index()
    (store / "attributes.npz").write_bytes(stale)
    reader = StoreReader(store)
    assert reader.listed_attributes().missing == ("00001", "00002")
    assert values_of(reader)[0]["quality"] == {"a0": 0.25}
    assert not verify_store(store).problems  # old, not wrong
    writer.write_attributes()
    assert StoreReader(store).listed_attributes().missing == ()
    assert values_of(StoreReader(store))[0]["quality"] == {"a0": 0.25, "c0": 0.75}


def test_an_updated_file_is_the_one_written_anew_and_keeps_no_dropped_text(store: Path) -> None:
    drop_clips(store, ["a0", "b1"], detail="a test")
    updated = (store / "attributes.npz").read_bytes()
    assert "Löwe".encode() not in updated
    (store / "attributes.npz").unlink()
    StoreWriter.open(store.parent, SETTINGS, provenance={}).write_attributes()
    assert (store / "attributes.npz").read_bytes() == updated


def test_a_reader_of_some_shards_lists_only_their_clips(store: Path) -> None:
    reader = StoreReader(store, shards=["00001"])
    assert values_of(reader)[1]["caption"] == {"b0": "", "b1": "Ein Löwe"}


def test_damage_is_named_and_repaired(store: Path) -> None:
    path = store / "attributes.npz"
    data = bytearray(path.read_bytes())
    data[data.index(b"Ein")] ^= 1
    path.write_bytes(data)
    listed = StoreReader(store).listed_attributes()
    assert "attributes.npz is damaged" in listed.problem
    assert listed.missing == ("00000", "00001")
    (problem,) = verify_store(store).problems
    assert problem.what.startswith("attributes.npz is damaged")
    assert repair_store(store).remaining == ()
    assert not path.exists()
    StoreWriter.open(store.parent, SETTINGS, provenance={}).write_attributes()
    assert values_of(StoreReader(store)) == (EXPECTED_NUMBERS, EXPECTED_TEXTS)


def test_a_value_that_no_record_has_is_found(store: Path) -> None:
    columns = dict(np.load(store / "attributes.npz"))
    columns["numbers.quality"] = columns["numbers.quality"] + 0.5
    with (store / "attributes.npz").open("wb") as file:
        np.savez(file, **columns)
    found = {problem.what for problem in verify_store(store).problems}
    assert found == {f"attributes.npz does not agree with commits/0000{n}.json" for n in (0, 1)}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_columns_that_do_not_fit_each_other_are_damage(name: str) -> None:
    columns = {column: np.zeros(0, dtype) for column, dtype in COLUMNS.items()}
    AttributeTable(columns)
    with pytest.raises(ValueError, match=r"rows|length|fit|overlap"):
        AttributeTable(columns | {name: np.ones(1, COLUMNS[name])})


def test_a_copy_has_the_table(store: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy" / store.name
    copy_store(store, target)
    assert (target / "attributes.npz").read_bytes() == (store / "attributes.npz").read_bytes()
    assert not verify_store(target).problems
    (store / "attributes.npz").write_bytes(b"damaged")
    copy_store(store, target)
    assert not (target / "attributes.npz").exists()


ATTRIBUTE = st.none() | st.integers(-3, 2**54) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.none() | st.sampled_from(["box", "mask", "", "ö"]) | st.just(3)
CLIP = st.fixed_dictionaries(
    {},
    optional={
        "quality": ATTRIBUTE,
        "lost_at": ATTRIBUTE,
        "caption": TEXT,
        "prompt": st.none()
        | st.fixed_dictionaries(
            {}, optional={"source": TEXT, "kinds": st.lists(TEXT), "confidence": ATTRIBUTE}
        ),
    },
)


def record_of(shard, clips, order):
    """A record whose clips have keys that are in another order than their indices."""
    entries = tuple(
        ClipEntry(
            f"{order[index]:02d}/{shard}",
            shard,
            3 * index,
            shard,
            "0" * 32,
            attributes,
            {"a": StoredArray("", 1, "0" * 8, "0" * 8)},
        )
        for index, attributes in enumerate(clips)
    )
    return CommitRecord(shard, 0, 0, shard, entries, (), {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CLIP, max_size=4), max_size=4), st.data())
def test_columns_are_those_of_a_loop_over_any_records(shards, data) -> None:
    records = [
        (record_of(f"{n}", clips, data.draw(st.permutations(range(4)))), n)
        for n, clips in enumerate(shards)
    ]
    stale = data.draw(st.sets(st.integers(0, 3)))
    earlier, builder = TableBuilder(), TableBuilder()
    for record, crc32c in records:
        earlier.add(record, crc32c + 100 * (crc32c in stale))
    table = AttributeTable(earlier.columns())
    index = ClipIndex.from_records(records, ["a"])
    listed = table.in_order_of(index)
    assert set(listed.missing) == {record.shard for record, n in records if n in stale}
    for record, crc32c in records:
        for clip in record.clips:
            row = index.keys.index(clip.key)
            known = {} if crc32c in stale else clip.attributes
            prompt = known.get("prompt") or {}
            for name, value in {
                "quality": known.get("quality"),
                "lost_at": known.get("lost_at"),
                "prompt.confidence": prompt.get("confidence"),
            }.items():
                exact = value is not None and not (isinstance(value, int) and value > 2**53)
                found = float(listed.numbers[name][row])
                assert found == value if exact else math.isnan(found)
            kinds = prompt.get("kinds")
            if kinds is not None:
                kinds = "+".join(kinds) if all(type(kind) is str for kind in kinds) else None
            for name, text in {
                "prompt.source": prompt.get("source"),
                "prompt.kinds": kinds,
                "caption": known.get("caption"),
            }.items():
                assert listed.texts[name].of(row) == (text if isinstance(text, str) else None)
        rows = table.rows_of(record.shard, crc32c)
        if rows is None:
            builder.add(record, crc32c)
        else:
            builder.keep(table, rows, record.shard, crc32c)
    anew = TableBuilder()
    for record, crc32c in records:
        anew.add(record, crc32c)
    updated = builder.columns()
    for name, column in anew.columns().items():
        np.testing.assert_array_equal(updated[name], column)
