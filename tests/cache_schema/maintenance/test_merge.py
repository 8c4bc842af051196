"""Merged stores contain the clips of all sources, wherever a merge was killed before."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    ArraySpec,
    CorruptClip,
    Refused,
    SettingsMismatch,
    ShardBusy,
    StoreNotFound,
    StoreReader,
    StoreSettings,
    StoreWriter,
    verify_store,
)
from cache_schema.maintenance.merge import merge_stores
from tests.cache_schema.faults.operations import run_and_kill
from tests.cache_schema.made_stores import SETTINGS, assert_whole, clip_of, files_of, write_shard
from tests.cache_schema.maintenance.copies import damage_file
from tests.fingerprints import fingerprint_of

MakeStore = Callable[[str, dict[str, list[str]]], Path]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store `<tmp>/<name>/teacher-…` with these shards and keys."""

    def make(name: str, shards: dict[str, list[str]]) -> Path:
        writer = StoreWriter.open(tmp_path / name, SETTINGS, provenance={"run": name})
        for shard, keys in shards.items():
            write_shard(writer, shard, keys, skip=f"{shard} skipped")
        writer.write_index()
        return writer.path

    return make


@pytest.fixture(params=["linked", "copied"])
def file_systems(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One file system, or two: no link can be made."""
    if request.param == "copied":
        monkeypatch.setattr("pathlib.Path.hardlink_to", _no_link)
    return request.param


def _no_link(*_: object, **__: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_new_store_holds_the_shards_of_all_and_the_first_ones_provenance(
    tmp_path: Path, make_store: MakeStore, file_systems: str
) -> None:
    one = make_store("one", {"00000": ["a0", "a1"]})
    two = make_store("two", {"00001": ["b0"], "00002": []})
    both = make_store("both", {"00000": ["a0", "a1"], "00001": ["b0"], "00002": []})
    advanced: list[int] = []
    report = merge_stores(tmp_path / "new" / one.name, [one, two], advance=advanced.append)
    assert_whole(report.store, ["a0", "a1", "b0"])
    assert StoreReader(report.store).provenance == {"run": "one"}
    found, expected = files_of(report.store), files_of(both)
    assert found.pop("store.json") == files_of(one)["store.json"]
    expected.pop("store.json")
    del found["index.npz"], expected["index.npz"]  # it knows store.json, and so whose it is
    assert found == expected
    assert verify_store(report.store).problems == ()
    assert report.shards == ("00000", "00001", "00002")
    assert (report.num_present, report.num_clips) == (0, 3)
    on_disk = sum(len(data) for path, data in expected.items() if path.startswith("shards/"))
    assert report.num_bytes == sum(advanced) == on_disk
    assert report.num_linked_bytes == (on_disk if file_systems == "linked" else 0)


def test_a_store_grows_and_a_second_run_changes_nothing(make_store: MakeStore) -> None:
    target = make_store("target", {"00000": ["a0", "a1"]})
    source = make_store("source", {"00000": ["a0", "a1"], "00001": ["b0", "b1"]})
    first = merge_stores(target, [source])
    assert (first.shards, first.num_present) == (("00001",), 1)
    assert_whole(target, ["a0", "a1", "b0", "b1"])
    assert StoreReader(target).provenance == {"run": "target"}
    before = files_of(target)
    second = merge_stores(target, [source, target])
    assert (second.shards, second.num_present, second.num_bytes) == ((), 4, 0)
    assert files_of(target) == before


def test_a_reader_opened_before_keeps_what_it_saw(make_store: MakeStore) -> None:
    target = make_store("target", {"00000": ["a0"]})
    reader = StoreReader(target)
    assert list(reader.keys) == ["a0"]
    merge_stores(target, [make_store("source", {"00001": ["b0"]})])
    assert list(reader.keys) == ["a0"]
    np.testing.assert_array_equal(reader.read("a0")["mask"], clip_of("a0")["mask"])


def test_shards_of_one_name_need_a_prefix(make_store: MakeStore) -> None:
    target = make_store("target", {"00000": ["a0"]})
    source = make_store("source", {"00000": ["b0"], "00000-retry1": ["b1"]})
    before = files_of(target)
    with pytest.raises(Refused, match=r"'00000' of .*source") as error:
        merge_stores(target, [source])
    assert error.value.remedy == "prefix"
    assert files_of(target) == before
    report = merge_stores(target, [source], prefix="more-")
    assert report.shards == ("more-00000", "more-00000-retry1")
    assert_whole(target, ["a0", "b0", "b1"])
    assert StoreReader(target).record("b0").source == "00000.tar"
    again = merge_stores(target, [source], prefix="more-")
    assert (again.shards, again.num_present) == ((), 2)
    with pytest.raises(ValueError, match=r"unsafe shard name '\.\./00000'"):
        merge_stores(target, [source], prefix="../")


def test_a_clip_in_two_stores_is_refused(make_store: MakeStore) -> None:
    target = make_store("target", {"00000": ["a0", "a1"]})
    source = make_store("source", {"00001": ["b0"], "00002": ["a1"]})
    before = files_of(target)
    with pytest.raises(Refused, match=r"'a1' \(shards '00000' and '00002'\)") as error:
        merge_stores(target, [source])
    assert error.value.remedy == "drop"
    assert files_of(target) == before


def test_two_sources_are_held_against_each_other(tmp_path: Path, make_store: MakeStore) -> None:
    one = make_store("one", {"00000": ["a0"]})
    two = make_store("two", {"00000": ["b0"]})
    three = make_store("three", {"00001": ["a0"]})
    target = tmp_path / "new" / one.name
    for source, remedy in ((two, "prefix"), (three, "drop")):
        with pytest.raises(Refused) as error:
            merge_stores(target, [one, source])
        assert error.value.remedy == remedy
    assert not target.exists()
    assert merge_stores(target, [one, one]).num_present == 1


@pytest.mark.parametrize("change", ["values", "compression"])
def test_stores_that_differ_are_named(tmp_path: Path, make_store: MakeStore, change: str) -> None:
    target = make_store("target", {"00000": ["a0"]})
    if change == "values":
        other, named = replace(SETTINGS, values={**SETTINGS.values, "fps": 12.0}), "values.fps"
    else:
        packed = replace(SETTINGS.arrays["mask"], compression="blosc-zstd-shuffle")
        other = replace(SETTINGS, arrays={**SETTINGS.arrays, "mask": packed})
        named = "arrays.mask.compression"
    source = StoreWriter.open(tmp_path / "other", other, provenance={}).path
    with pytest.raises(SettingsMismatch, match=f"differ in {named};"):
        merge_stores(target, [source])


def test_compressed_arrays_are_merged_and_checked(tmp_path: Path) -> None:
    spec = ArraySpec(
        dtype="float32",
        shape=(4, 50),
        dimension_names=("t", "c"),
        compression="blosc-zstd-shuffle",
    )
    settings = StoreSettings(kind="gram_flow", arrays={"gram_flow": spec}, values={})
    writer = StoreWriter.open(tmp_path / "source", settings, provenance={})
    values = np.linspace(0, 1, 200, dtype="float32").reshape(4, 50)
    with writer.shard("00000", source="0") as shard:
        shard.add("a", {"gram_flow": values}, fingerprint=fingerprint_of("a"))
        shard.commit()
    target = tmp_path / "new" / writer.path.name
    merge_stores(target, [writer.path])
    np.testing.assert_array_equal(StoreReader(target).read("a")["gram_flow"], values)


def test_arguments_that_make_no_sense(tmp_path: Path, make_store: MakeStore) -> None:
    source = make_store("source", {"00000": ["a0"]})
    with pytest.raises(ValueError, match="at least one store"):
        merge_stores(source, [])
    with pytest.raises(ValueError, match=f"must be named {source.name}"):
        merge_stores(tmp_path / "new", [source])
    with pytest.raises(StoreNotFound):
        merge_stores(source, [tmp_path / "nothing"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "metadata"])
def test_a_damaged_source_is_never_merged(make_store: MakeStore, damage: str) -> None:
    target = make_store("target", {"00000": ["a0"]})
    source = make_store("source", {"00001": ["b0"], "00002": ["c0", "c1"]})
    group = source / "shards" / "00002"
    file = group / ("mask/zarr.json" if damage == "metadata" else "features/c.1.0.0.0.0")
    damage_file(file, damage)
    with pytest.raises(CorruptClip, match=r"shard '00002' of ") as error:
        merge_stores(target, [source])
    assert error.value.remedy == "repair"
    assert_whole(target, ["a0", "b0"])
    shutil.rmtree(source)
    mended = make_store("source", {"00001": ["b0"], "00002": ["c0", "c1"]})
    assert merge_stores(target, [mended]).shards == ("00002",)
    assert_whole(target, ["a0", "b0", "c0", "c1"])


def test_a_shard_that_a_writer_has_begun(make_store: MakeStore) -> None:
    target = make_store("target", {"00000": ["a0"]})
    source = make_store("source", {"00001": ["b0", "b1"]})
    writer = StoreWriter.open(target.parent, SETTINGS, provenance={})
    with writer.shard("00001", source="00001.tar") as shard:
        shard.add("b0", clip_of("b0"), fingerprint=fingerprint_of("b0"))
        with pytest.raises(ShardBusy, match="00001"):
            merge_stores(target, [source])
    with writer.shard("00001", source="elsewhere.tar") as shard:
        shard.add("x0", clip_of("x0"), fingerprint=fingerprint_of("x0"))
    with pytest.raises(Refused) as error:
        merge_stores(target, [source])
    assert error.value.remedy == "prefix"
    with writer.shard("00001", source="00001.tar") as shard:  # sweeps the other input's clips
        shard.add("b0", clip_of("b0"), fingerprint=fingerprint_of("b0"))
    assert merge_stores(target, [source]).shards == ("00001",)
    assert_whole(target, ["a0", "b0", "b1"])
    assert list((target / ".staging").iterdir()) == []


def test_a_replaced_shard_arrives_as_generation_0(make_store: MakeStore) -> None:
    from cache_schema.maintenance.drop import drop_clips

    target = make_store("target", {"00000": ["a0"]})
    source = make_store("source", {"00001": ["b0", "b1", "b2"]})
    drop_clips(source, ["b1"], detail="blurred")
    merge_stores(target, [source])
    assert_whole(target, ["a0", "b0", "b2"])
    record = json.loads((target / "commits" / "00001.json").read_text("utf-8"))
    assert record["generation"] == 0
    assert {path.name for path in (target / "shards").iterdir()} == {"00000", "00001"}
    assert merge_stores(target, [source]).num_present == 1


@pytest.fixture(scope="module")
def chance() -> random.Random:
    return random.Random(7)


@pytest.mark.parametrize("part", range(8))
def test_a_killed_merge_is_finished_by_the_next_one(
    part: int, tmp_path: Path, make_store: MakeStore, file_systems: str, chance: random.Random
) -> None:
    shards = {"00001": ["b0", "b1"], "00002": ["c0", "c1", "c2"]}
    keys = [["a0"], ["a0", "b0", "b1"], ["a0", "b0", "b1", "c0", "c1", "c2"]]
    source = make_store("source", shards)
    target = make_store("target", {"00000": ["a0"]})
    whole = shutil.copytree(target, tmp_path / "whole" / target.name)
    code, operations = run_and_kill(lambda: merge_stores(whole, [source]), 0)
    assert code == 0
    kill_at = [1 + (part * operations + chance.randrange(operations)) // 8]
    kill_at += [chance.randrange(1, operations)] * (part % 2)  # and once more while it recovers
    for number in kill_at:
        committed = {p: p.stat().st_ino for p in target.glob("commits/*.json")}
        run_and_kill(lambda: merge_stores(target, [source]), number)
        reader = StoreReader(target)
        assert list(reader.keys) in keys
        assert_whole(target, list(reader.keys))
        assert (
            committed.items() <= {p: p.stat().st_ino for p in target.glob("commits/*.json")}.items()
        )
    merge_stores(target, [source])
    assert_whole(target, keys[-1])
    assert files_of(target) == files_of(whole)
    assert _folders(target) == _folders(whole)


def _folders(store: Path) -> set[str]:
    return {str(Path(at).relative_to(store)) for at, _, _ in os.walk(store)}
