"""Staging left by an earlier writer: adopted if intact and current, otherwise removed.

Writers killed at any point are in `faults/`.
"""

from pathlib import Path

import pytest

from cache_schema import CacheError, StoreReader, StoreWriter
from cache_schema.maintenance.verify import verify_store
from tests.cache_schema.made_stores import SETTINGS, clip_of, files_of, write_shard
from tests.fingerprints import fingerprint_of


def _stage(writer: StoreWriter, keys: list[str]) -> None:
    with writer.shard("0", source="0.tar") as shard:
        for key in keys:
            shard.add(key, clip_of(key), fingerprint=fingerprint_of(key))
        shard.skip("bad", "undecodable", "no video stream", fingerprint=fingerprint_of("bad"))


def _staged(writer: StoreWriter, keys: list[str], source: str = "0.tar") -> list[str]:
    with writer.shard("0", source=source) as shard:
        return [key for key in keys if shard.has(key)]


def test_staged_clips_are_adopted_but_not_visible(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    _stage(writer, ["a", "b"])
    assert StoreReader(writer.path).keys == ()
    assert not writer.is_committed("0")
    assert _staged(writer, ["a", "b", "c", "bad"]) == ["a", "b", "bad"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_damaged_staged_clips_are_made_again(tmp_path: Path, damage: str) -> None:
    whole = StoreWriter.open(tmp_path / "whole", SETTINGS, provenance={})
    _stage(whole, ["a", "b", "c"])
    with whole.shard("0", source="0.tar") as shard:
        shard.commit()
    writer = StoreWriter.open(tmp_path / "damaged", SETTINGS, provenance={})
    _stage(writer, ["a", "b", "c"])
    (chunks,) = writer.path.glob(".staging/0/*/staged/shard/features")
    chunk = chunks / "c.1.0.0.0.0"
    data = bytearray(chunk.read_bytes())
    if damage == "flip":
        data[7] ^= 1
        chunk.write_bytes(data)
    elif damage == "truncate":
        chunk.write_bytes(data[:-1])
    elif damage == "delete":
        chunk.unlink()
    else:
        chunk.write_bytes((chunks / "c.0.0.0.0.0").read_bytes())
    with writer.shard("0", source="0.tar") as shard:
        assert [key for key in ("a", "b", "c", "bad") if shard.has(key)] == ["a"]
        for key in ("b", "c"):
            shard.add(key, clip_of(key), fingerprint=fingerprint_of(key))
        shard.skip("bad", "undecodable", "no video stream", fingerprint=fingerprint_of("bad"))
        shard.commit()
    assert files_of(writer.path) == files_of(whole.path)


def test_clips_staged_from_another_input_are_swept(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    _stage(writer, ["a", "b"])
    assert _staged(writer, ["a", "b", "bad"], source="another.tar") == []


def test_a_failed_write_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    writer = StoreWriter.open(tmp_path / "full", SETTINGS, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.add("a", clip_of("a"), fingerprint=fingerprint_of("a"))
        with monkeypatch.context() as patch:
            patch.setattr("cache_schema.shard_writer.write_atomic", fail)
            with pytest.raises(OSError, match="No space left"):
                shard.add("never", clip_of("never"), fingerprint=fingerprint_of("never"))
        assert not shard.has("never")
        shard.commit()
    assert StoreReader(writer.path).keys == ("a",)
    other = StoreWriter.open(tmp_path / "roomy", SETTINGS, provenance={})
    with other.shard("0", source="0") as shard:
        shard.add("a", clip_of("a"), fingerprint=fingerprint_of("a"))
        shard.commit()
    assert files_of(writer.path) == files_of(other.path)


def test_an_exception_keeps_what_is_staged_and_lets_go_of_the_shard(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    with pytest.raises(CacheError, match="out of memory"), writer.shard("0", source="0") as shard:
        shard.add("a", clip_of("a"), fingerprint=fingerprint_of("a"))
        raise CacheError("out of memory")
    assert _staged(writer, ["a"], source="0") == ["a"]


def test_deleting_a_commit_record_makes_the_shard_again(store: Path) -> None:
    before = files_of(store)
    (store / "commits" / "00000.json").unlink()
    assert StoreReader(store).keys == ("b0", "b1")
    (problem,) = verify_store(store).problems
    assert problem.shard == "00000"
    assert "no commit record" in problem.what
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    assert files_of(store) == before


def test_staged_clips_are_adopted_up_to_the_first_that_is_made_from_another_source(
    tmp_path: Path,
) -> None:
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    _stage(writer, ["a", "b", "c"])
    current = {key: fingerprint_of(key) for key in ("a", "b", "c", "bad")}
    current["b"] = fingerprint_of("another b")

    def staged(source: str) -> list[str]:
        shard = writer.shard(
            "0", source=source, is_current=lambda key, found: current.get(key) == found
        )
        with shard:
            return [key for key in current if shard.has(key)]

    # Whatever the source is called now.
    assert staged("renamed.tar") == ["a"]
    assert staged("0.tar") == ["a"]
