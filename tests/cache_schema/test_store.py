"""Writing a store and reading it back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import (
    AlreadyCommitted,
    ArraySpec,
    ClipMissing,
    CorruptClip,
    SettingsMismatch,
    StoreReader,
    StoreSettings,
    StoreWriter,
    verify_store,
)
from tests.cache_schema.made_stores import SETTINGS, clip_of, files_of, write_shard
from tests.fingerprints import fingerprint_of

Arrays = dict[str, np.ndarray]


def test_frames_larger_than_a_shared_chunk_are_stored_one_by_one(tmp_path: Path) -> None:
    spec = ArraySpec(dtype="float32", shape=(2, 600, 500), dimension_names=("t", "h", "w"))
    settings = StoreSettings(kind="big", arrays={"frames": spec}, values={})
    values = np.arange(600_000, dtype="float32").reshape(spec.shape)
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    with writer.shard("s", source="s") as shard:
        shard.add("k", {"frames": values}, fingerprint=fingerprint_of("k"))
        shard.commit()
    np.testing.assert_array_equal(StoreReader(writer.path).read("k")["frames"], values)
    array: Any = zarr.open_array(str(writer.path / "shards" / "s"), path="frames", mode="r")
    assert array.chunks == (1, 1, 600, 500)
    np.testing.assert_array_equal(array[0, 1], values[1])


def test_clips_of_nothing_but_fill_values_survive(tmp_path: Path) -> None:
    zeros = {n: np.zeros(s.shape, s.dtype) for n, s in SETTINGS.arrays.items()}
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.add("zero", zeros, fingerprint=fingerprint_of("zero"))
        shard.add("zero again", zeros, fingerprint=fingerprint_of("zero again"))
        shard.commit()
    for array in StoreReader(writer.path).read("zero again").values():
        assert not array.any()
    assert verify_store(writer.path).problems == ()


def test_a_shard_of_skipped_clips_only_is_committed(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.skip("k", "undecodable", "moov atom not found", fingerprint=fingerprint_of("k"))
        shard.commit()
    assert writer.is_committed("0")
    reader = StoreReader(writer.path)
    assert len(reader) == 0
    assert [clip.key for clip in reader.skipped] == ["k"]
    assert verify_store(writer.path).problems == ()


def test_an_empty_store_reads_as_empty(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    assert StoreReader(writer.path).keys == ()
    assert verify_store(writer.path).num_clips == 0


def test_saying_twice_that_a_clip_is_skipped_records_it_once(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))
        for _ in range(2):
            shard.skip("k", "duplicate_key", "a second k.mp4", fingerprint=fingerprint_of("k"))
        shard.commit()
    reader = StoreReader(writer.path)
    assert [clip.reason for clip in reader.skipped] == ["duplicate_key"]
    assert "k" in reader


def test_what_a_retry_found_counts_and_what_it_brought_in_is_no_longer_skipped(
    tmp_path: Path,
) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})

    def write(name: str, clips: str, skipped: dict[str, str]) -> None:
        with writer.shard(name, source=f"source of {name}") as shard:
            for key in clips:
                shard.add(key, clip_of(key), fingerprint=fingerprint_of(key))
            for key, reason in skipped.items():
                shard.skip(key, reason, f"as {name} says", fingerprint=fingerprint_of(key))
            shard.commit()

    write("0", "a", {"b": "undecodable", "c": "too_short", "d": "no_prompt"})
    write("0-retry2", "b", {"c": "subject_lost"})
    write("0-retry10", "", {"c": "nothing_found"})
    write("1", "e", {"f": "too_short"})
    reader = StoreReader(writer.path)
    assert reader.keys == ("a", "b", "e")
    assert [(c.key, c.reason, c.shard) for c in reader.skipped] == [
        ("d", "no_prompt", "0"),
        ("c", "nothing_found", "0-retry10"),
        ("f", "too_short", "1"),
    ]
    with pytest.raises(ClipMissing, match="as 0-retry10 says"):
        reader.read("c")
    assert list(reader.shards) == ["0", "0-retry10", "0-retry2", "1"]
    assert reader.shards["0-retry2"].source == "source of 0-retry2"
    assert verify_store(writer.path).problems == ()
    with writer.shard("2", source="2") as shard:
        assert [shard.shard_holding(key) for key in "abc"] == ["0", "0-retry2", None]
    (writer.path / "shards" / "0-retry2" / reader.record("b").arrays["mask"].path).unlink()
    with pytest.raises(CorruptClip) as caught:
        reader.read("b")
    assert caught.value.remedy == "repair"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["features"].__setitem__((0, 0, 0, 0), np.nan), "1 of 72 values .* NaN"),
        (lambda a: a["features"].fill(np.inf), "72 of 72"),
        (lambda a: a.pop("mask"), r"has the arrays \['features'\]"),
        (lambda a: a.update(colour=np.zeros(3)), "colour"),
        (lambda a: a.update(mask=np.zeros((2, 3))), r"float64 \(2, 3\); the store holds uint8"),
        (lambda a: a.update(mask=np.zeros((3, 2), "uint8")), r"uint8 \(3, 2\)"),
        (lambda a: a.update(mask=[[0, 0, 0]] * 2), "list, not an ndarray"),
        (lambda a: a.update(features=a["features"].astype(">f2")), ">f2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_staged(
    tmp_path: Path, change: Callable[[Arrays], Any], message: str
) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    arrays = clip_of("k")
    change(arrays)
    with writer.shard("0", source="0") as shard:
        with pytest.raises(ValueError, match=message) as error:
            shard.add("k", arrays, fingerprint=fingerprint_of("k"))
        assert "clip 'k'" in str(error.value)
        assert str(writer.path) in str(error.value)
        assert not shard.has("k")
        shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))
        shard.commit()
    assert StoreReader(writer.path).keys == ("k",)


def test_non_contiguous_arrays_are_stored_by_value(tmp_path: Path) -> None:
    spec = ArraySpec(dtype="float32", shape=(3, 4), dimension_names=("a", "b"))
    settings = StoreSettings(kind="x", arrays={"v": spec}, values={})
    values = np.arange(24, dtype="float32").reshape(4, 6).T[::2]
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.add("k", {"v": values}, fingerprint=fingerprint_of("k"))
        shard.commit()
    np.testing.assert_array_equal(StoreReader(writer.path).read("k")["v"], values)


@pytest.mark.parametrize("attributes", [{"fps": np.float32(8)}, {"x": float("nan")}, {1: 2}])
def test_attributes_that_are_not_json_are_refused(tmp_path: Path, attributes: Any) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with (
        writer.shard("0", source="0") as shard,
        pytest.raises(ValueError, match="attributes of clip 'k'"),
    ):
        shard.add("k", clip_of("k"), attributes, fingerprint=fingerprint_of("k"))


def test_a_key_is_written_once_in_a_shard(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))
        with pytest.raises(ValueError, match="already in shard '0'"):
            shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))


def test_a_key_of_another_finished_shard_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    write_shard(writer, "0", ["k"])
    with (
        writer.shard("1", source="1") as shard,
        pytest.raises(ValueError, match="'k' of shard '1' is already in shard '0'"),
    ):
        shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a\nb",
        "tab\t",
        "nul\0",
        "\x7f",
        "\x85",
        "\ud800",
        "k" * 1025,
        "é" * 513,
        7,
        "../x",
        "/x",
        "a/../b",
        "..",
    ],
)
def test_keys_without_a_safe_text_are_refused(tmp_path: Path, key: Any) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with (
        writer.shard("0", source="0") as shard,
        pytest.raises(ValueError, match="clip key"),
    ):
        shard.add(key, clip_of("k"), fingerprint=fingerprint_of("k"))


any_key = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)


@hypothesis.settings(max_examples=12)
@given(keys=st.lists(any_key, min_size=1, max_size=4, unique=True))
def test_any_other_text_is_a_key_and_never_a_path(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
) -> None:
    keys = [key.lstrip("/").replace("..", ".") or "k" for key in keys]
    keys = [*dict.fromkeys(keys), "etc/..passwd../" + keys[0], "k/" * 512]
    root = tmp_path_factory.mktemp("keys")
    writer = StoreWriter.open(root / "cache", SETTINGS, provenance={})
    write_shard(writer, "0", keys)
    reader = StoreReader(writer.path)
    assert reader.keys == sorted(keys)
    for key in keys:
        np.testing.assert_array_equal(reader.read(key)["features"], clip_of(key)["features"])
    assert [path.name for path in root.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/abs",
        ".x",
        "-x",
        "a\\b",
        "a b",
        "ä",
        "x.lock",
        "a\n",
        "n" * 129,
    ],
)
def test_unsafe_shard_names_are_refused(tmp_path: Path, name: str) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with pytest.raises(ValueError, match="unsafe shard name"):
        writer.shard(name, source="x")
    with pytest.raises(ValueError, match="unsafe shard name"):
        writer.is_committed(name)


def test_a_finished_shard_is_never_written_again(store: Path) -> None:
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    assert writer.is_committed("00000")
    assert not writer.is_committed("00002")
    with pytest.raises(AlreadyCommitted, match="00000"), writer.shard("00000", source="x"):
        pass


def test_a_shard_writer_is_used_inside_its_with_block(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    shard = writer.shard("0", source="0")
    with pytest.raises(ValueError, match="with"):
        shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))
    with shard:
        shard.commit()
        with pytest.raises(ValueError, match="not after commit"):
            shard.add("k", clip_of("k"), fingerprint=fingerprint_of("k"))


def test_reopening_keeps_the_first_provenance(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={"version": "1"})
    before = files_of(writer.path)
    StoreWriter.open(tmp_path, SETTINGS, provenance={"version": "2"})
    assert files_of(writer.path) == before
    assert StoreReader(writer.path).provenance == {"version": "1"}


def test_other_settings_in_the_folder_are_named_and_refused(tmp_path: Path) -> None:
    other = StoreSettings(
        kind="teacher",
        arrays=SETTINGS.arrays,
        values={**SETTINGS.values, "fps": 16.0, "prompt": {"kind": "box"}},
    )
    made = StoreWriter.open(tmp_path, other, provenance={})
    made.path.rename(tmp_path / SETTINGS.folder_name)
    with pytest.raises(SettingsMismatch, match=r"\(values.fps, values.prompt.kind\)"):
        StoreWriter.open(tmp_path, SETTINGS, provenance={})


def test_files_on_disk_hold_no_time_and_no_place(tmp_path: Path) -> None:
    found = []
    for folder in ("here", "there"):
        writer = StoreWriter.open(tmp_path / folder, SETTINGS, provenance={})
        write_shard(writer, "00000", ["a", "b"], skip="c")
        found.append(files_of(writer.path))
    assert found[0] == found[1]


def test_a_clip_costs_a_file_for_each_array_and_no_folder(tmp_path: Path) -> None:
    def entries(keys: list[str]) -> int:
        writer = StoreWriter.open(tmp_path / str(len(keys)), SETTINGS, provenance={})
        write_shard(writer, "0", keys)
        writer.write_index()
        return sum(1 for _ in writer.path.rglob("*"))

    assert entries(["a", "b", "c"]) - entries(["a"]) == 2 * len(SETTINGS.arrays)
