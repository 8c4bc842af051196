"""Readers that stay open while a store is repaired and refilled, as in a long training."""

import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema import ClipChanged, ClipMissing, CorruptClip, StoreReader, StoreWriter
from cache_schema.commit import ShardClaim
from cache_schema.maintenance.drop import change_fingerprints, drop_clips, keep_clips
from cache_schema.maintenance.repair import repair_store
from cache_schema.names import StoreLayout
from cache_schema.records import read_commit_with_crc32c
from cache_schema.storage import LocalStorage
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    SHARDS,
    assert_equals_the_clip,
    clip_of,
    write_again,
    write_all,
)
from tests.fingerprints import fingerprint_of

Asked = Counter[str]


def _open_and_read(store: Path) -> StoreReader:
    reader = StoreReader(store)
    for key in reader.keys:
        assert_equals_the_clip(reader, key)
    return reader


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """How often each file of a store was opened, or read from."""
    counts: Asked = Counter()
    for name in ("open", "read", "read_range"):
        method: Callable[..., Any] = getattr(LocalStorage, name)

        def counted(
            self: LocalStorage,
            path: str,
            *rest: Any,
            method: Callable[..., Any] = method,
            **options: Any,
        ) -> Any:
            counts[path] += 1
            return method(self, path, *rest, **options)

        monkeypatch.setattr(LocalStorage, name, counted)
    return counts


def _move(store: Path, shard: str) -> None:
    """Replace a shard by one of all its clips in another folder."""
    layout = StoreLayout(store)
    with ShardClaim(layout, shard) as claim:
        record, crc32c = read_commit_with_crc32c(layout, SETTINGS, shard)
        keep_clips(
            claim,
            SETTINGS,
            record,
            record.clips,
            record.skipped,
            crc32c=crc32c,
            quarantine=layout.quarantine / "1",
        )


def _hurt(store: Path, shard: str, array: str, clip: int) -> None:
    (file,) = store.glob(f"shards/{shard}/{array}/c.{clip}.*")
    file.write_bytes(b"")


def test_a_clip_that_a_repair_took_out_is_missed_and_its_neighbours_are_read(
    tmp_path: Path,
) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    _hurt(store, "00000", "mask", 1)
    repair_store(store)
    with pytest.raises(ClipMissing, match=r"removed from shard '00000' .*skipped as damaged"):
        reader.read("a1")
    for key in ("a0", "a2", *SHARDS["00001"]):
        assert_equals_the_clip(reader, key)


def test_a_shard_is_followed_through_every_replacement(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    for key in ("a0", "a1"):
        drop_clips(store, [key], detail="a cut")
        assert_equals_the_clip(reader, "a2")
        assert_equals_the_clip(pickle.loads(pickle.dumps(reader)), "a2")
    # What is gone stays so, though a retry has brought it back: that is another shard.
    drop_clips(store, ["a2"], detail="again", reason="redo")
    write_again(store)
    for key in SHARDS["00000"]:
        with pytest.raises(ClipMissing, match="since the store was opened"):
            reader.read(key)


def test_a_replaced_shard_costs_its_record_once_and_other_shards_nothing(
    tmp_path: Path, asked: Asked
) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    asked.clear()
    for key in reader.keys:
        reader.read(key)
    assert asked.total() == 15, "a file each, and nothing else"
    _hurt(store, "00000", "mask", 0)
    repair_store(store)
    asked.clear()
    for _ in range(3):
        for key in ("a1", "a2", "b0"):
            assert_equals_the_clip(reader, key)
        with pytest.raises(ClipMissing):
            reader.read("a0")
    # The head that tells of it, and all of it, once: then only files of clips that are there.
    assert {path: n for path, n in asked.items() if path.startswith("commits/")} == {
        "commits/00000.json": 2
    }
    assert sum(n for path, n in asked.items() if path.startswith("shards/00000/")) == 1
    assert asked.total() == 2 + 1 + 3 * 3 * 3


def test_a_dropped_clip_costs_its_neighbours_nothing(tmp_path: Path, asked: Asked) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    drop_clips(store, ["a0"], detail="a cut")
    asked.clear()
    for key in ("a1", "a2"):
        assert_equals_the_clip(reader, key)
    assert asked.total() == 2 * 3, "a file each, and nothing else"
    with pytest.raises(ClipMissing, match="skipped as dropped"):
        reader.read("a0")


def test_a_clip_made_again_with_other_values_is_refused(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    (store / "commits" / "00000.json").unlink()
    shutil.rmtree(store / "shards" / "00000")
    (store / "index.npz").unlink()
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with writer.shard("00000", source="00000.tar") as shard:
        for key in SHARDS["00000"]:
            arrays = clip_of(key)
            if key == "a1":
                arrays["mask"][0, 0] ^= 1
            shard.add(key, arrays, fingerprint=fingerprint_of(f"{key}, of today"))
        shard.commit()
    with pytest.raises(ClipChanged, match=r"'a1' .*made again .*its mask has other values"):
        reader.read("a1")
    # One array of a clip is refused where another has changed: they belong together.
    with pytest.raises(ClipChanged):
        reader.read("a1", ["features"])
    for key in ("a0", "a2"):
        assert_equals_the_clip(reader, key)


def test_a_clip_with_another_fingerprint_and_the_same_values_is_read(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    change_fingerprints(store, {key: fingerprint_of(f"{key}, moved") for key in reader.keys})
    for key in reader.keys:
        assert_equals_the_clip(reader, key)


def test_a_clip_damaged_in_the_next_generation_is_damaged(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    drop_clips(store, ["a0"], detail="a cut")
    _hurt(store, "00000", "flow", 2)
    for _ in range(2):
        with pytest.raises(CorruptClip, match=r"'a2' .*is damaged: shards/00000/flow"):
            reader.read("a2")
    assert_equals_the_clip(reader, "a1")


@pytest.mark.parametrize("state", ["lost", "damaged"])
def test_a_shard_whose_record_cannot_be_read_any_more_is_damaged(
    tmp_path: Path, state: str
) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    record = store / "commits" / "00000.json"
    _move(store, "00000")
    if state == "lost":
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:-5])
    with pytest.raises(CorruptClip, match=r"commits/00000\.json ") as caught:
        reader.read("a1")
    assert caught.value.remedy == "repair"
    assert_equals_the_clip(reader, "b0")


@pytest.mark.parametrize("times", [1, 3, 99])
def test_a_shard_replaced_between_its_record_and_its_file_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    store = write_all(tmp_path)
    reader = _open_and_read(store)
    _move(store, "00000")
    left = iter(range(times))
    opened = LocalStorage.open

    def replaced_first(self: LocalStorage, path: str, *rest: Any) -> Any:
        if path.startswith("shards/00000") and next(left, None) is not None:
            _move(store, "00000")
        return opened(self, path, *rest)

    monkeypatch.setattr(LocalStorage, "open", replaced_first)
    if times < 99:
        assert_equals_the_clip(reader, "a2")
        assert next(left, None) is None
    else:
        with pytest.raises(CorruptClip, match=r"was replaced 8 times .*try again when nothing"):
            reader.read("a2")


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
    for key in SHARDS["00000"][1:]:
        assert_equals_the_clip(reader, key)
    with pytest.raises(ClipMissing, match=r"undecodable \(it no longer decodes\)"):
        reader.read(SHARDS["00000"][0])
