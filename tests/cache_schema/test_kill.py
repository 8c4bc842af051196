"""A writer killed anywhere: nothing wrong is ever read, nothing finished is redone.

The writer runs in a forked child that sends itself SIGKILL at its n-th file operation (opening,
renaming, making or removing anything), as Python's audit events count them.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import (
    ArraySpec,
    CacheError,
    StoreNotFound,
    StoreReader,
    StoreSettings,
    StoreWriter,
    verify_store,
)

Arrays = dict[str, np.ndarray]
ClipOf = Callable[[str], Arrays]
FilesOf = Callable[[Path], dict[str, bytes]]

fork = multiprocessing.get_context("fork")

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
SHARDS = {"00000": ["a0", "a1"], "00001": ["b0", "b1", "b2"]}


def _run(body: Callable[[], None], kill_at: int) -> tuple[int, int]:
    """Exit code of a child running `body`, and the file operations it got to."""
    counted = RawValue("q", 0)  # no lock that a killed child could keep

    def child() -> None:
        lock = threading.Lock()

        def count(event: str, args: tuple[Any, ...]) -> None:
            if event in OPERATIONS:
                with lock:
                    counted.value += 1
                    if counted.value == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        body()
        os._exit(0)

    process = fork.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, counted.value


@pytest.fixture(scope="module")
def write_all(settings: StoreSettings, write_shard: Callable[..., None]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        writer = StoreWriter.open(root, settings, provenance={"version": "1"})
        for shard, keys in SHARDS.items():
            write_shard(writer, shard, keys, skip=f"{shard} skipped")
        return writer.path

    return write


def _assert_readers_see_whole_shards_only(root: Path, folder: str, clip_of: ClipOf) -> None:
    try:
        reader = StoreReader(root / folder)
    except StoreNotFound:
        return
    whole = [[], SHARDS["00000"], SHARDS["00000"] + SHARDS["00001"]]
    assert list(reader.keys) in whole
    for key in reader.keys:
        for name, values in reader.read(key).items():
            np.testing.assert_array_equal(values, clip_of(key)[name])


def _finished_files(store: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file of the finished shards."""
    files = list(store.glob("commits/*.json"))
    for commit in list(files):
        files += [p for p in (store / "shards" / commit.stem).rglob("*") if p.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def _kill_then_finish(
    root: Path,
    kill_at: list[int],
    expected: dict[str, bytes],
    write_all: Callable[[Path], Path],
    clip_of: ClipOf,
    files_of: FilesOf,
    folder: str,
) -> None:
    for n in kill_at:
        before = _finished_files(root / folder)
        _run(lambda: write_all(root) and None, n)
        _assert_readers_see_whole_shards_only(root, folder, clip_of)
        assert before.items() <= _finished_files(root / folder).items()
    before = _finished_files(root / folder)
    store = write_all(root)
    assert before.items() <= _finished_files(store).items()
    assert files_of(store) == expected
    assert verify_store(store).problems == ()


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, write_all: Callable[[Path], Path], files_of: FilesOf
) -> tuple[dict[str, bytes], int]:
    """The files of a run that was left alone, and the number of its file operations."""
    root = tmp_path_factory.mktemp("uninterrupted")
    code, operations = _run(lambda: write_all(root) and None, -1)
    assert code == 0
    assert operations > 100
    (store,) = root.iterdir()
    return files_of(store), operations


@pytest.mark.parametrize("part", range(12))
def test_a_killed_run_finishes_bit_for_bit_as_an_uninterrupted_one(
    part: int,
    tmp_path: Path,
    settings: StoreSettings,
    uninterrupted: tuple[dict[str, bytes], int],
    write_all: Callable[[Path], Path],
    clip_of: ClipOf,
    files_of: FilesOf,
) -> None:
    expected, operations = uninterrupted
    chance = random.Random(part)
    kill_at = [1 + (part * operations + chance.randrange(operations)) // 12]
    if part % 3 == 0:  # and killed again while it recovers
        kill_at.append(1 + chance.randrange(operations))
    _kill_then_finish(
        tmp_path / "cache", kill_at, expected, write_all, clip_of, files_of, settings.folder_name
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_single_point_can_be_survived(
    tmp_path: Path,
    settings: StoreSettings,
    uninterrupted: tuple[dict[str, bytes], int],
    write_all: Callable[[Path], Path],
    clip_of: ClipOf,
    files_of: FilesOf,
) -> None:
    expected, operations = uninterrupted
    chance = random.Random(0)
    for n in range(1, operations + 1):
        again = 1 + chance.randrange(operations)
        _kill_then_finish(
            tmp_path / str(n),
            [n, again],
            expected,
            write_all,
            clip_of,
            files_of,
            settings.folder_name,
        )


def test_a_kill_in_the_middle_of_a_large_write_leaves_no_trace(
    tmp_path: Path, files_of: FilesOf
) -> None:
    spec = ArraySpec(dtype="float32", shape=(4, 500, 1000), dimension_names=("t", "h", "w"))
    settings = StoreSettings(kind="large", arrays={"frames": spec}, values={})

    def write(root: Path) -> Path:
        writer = StoreWriter.open(root, settings, provenance={})
        if not writer.is_committed("0"):
            with writer.shard("0", source="0") as shard:
                for i in range(6):
                    if not shard.has(f"k{i}"):
                        shard.add(f"k{i}", {"frames": np.full(spec.shape, i, "float32")})
                shard.commit()
        return writer.path

    expected = files_of(write(tmp_path / "uninterrupted"))
    chance = random.Random(1)
    root = tmp_path / "cache"
    for _ in range(3):
        process = fork.Process(target=write, args=(root,))
        process.start()
        time.sleep(chance.uniform(0.02, 0.15))
        process.kill()
        process.join()
        try:
            reader = StoreReader(root / settings.folder_name)
        except StoreNotFound:
            continue
        for key in reader.keys:
            assert (reader.read(key)["frames"] == int(key[1:])).all()
    assert files_of(write(root)) == expected


def _stage(writer: StoreWriter, keys: list[str], clip_of: ClipOf) -> None:
    with writer.shard("0", source="0.tar") as shard:
        for key in keys:
            shard.add(key, clip_of(key))
        shard.skip("bad", "undecodable", "no video stream")


def _staged(writer: StoreWriter, keys: list[str], source: str = "0.tar") -> list[str]:
    with writer.shard("0", source=source) as shard:
        return [key for key in keys if shard.has(key)]


def test_staged_clips_are_adopted_but_not_visible(
    tmp_path: Path, settings: StoreSettings, clip_of: ClipOf
) -> None:
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    _stage(writer, ["a", "b"], clip_of)
    assert StoreReader(writer.path).keys == ()
    assert not writer.is_committed("0")
    assert _staged(writer, ["a", "b", "c", "bad"]) == ["a", "b", "bad"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_damaged_staged_clips_are_made_again(
    tmp_path: Path, settings: StoreSettings, clip_of: ClipOf, files_of: FilesOf, damage: str
) -> None:
    whole = StoreWriter.open(tmp_path / "whole", settings, provenance={})
    _stage(whole, ["a", "b", "c"], clip_of)
    with whole.shard("0", source="0.tar") as shard:
        shard.commit()
    writer = StoreWriter.open(tmp_path / "damaged", settings, provenance={})
    _stage(writer, ["a", "b", "c"], clip_of)
    chunks = writer.path / ".staging" / "0" / "shard" / "features" / "c"
    chunk = chunks / "1" / "0" / "0" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    if damage == "flip":
        data[7] ^= 1
        chunk.write_bytes(data)
    elif damage == "truncate":
        chunk.write_bytes(data[:-1])
    elif damage == "delete":
        chunk.unlink()
    else:
        chunk.write_bytes((chunks / "0" / "0" / "0" / "0" / "0").read_bytes())
    with writer.shard("0", source="0.tar") as shard:
        assert [key for key in ("a", "b", "c", "bad") if shard.has(key)] == ["a"]
        for key in ("b", "c"):
            shard.add(key, clip_of(key))
        shard.skip("bad", "undecodable", "no video stream")
        shard.commit()
    assert files_of(writer.path) == files_of(whole.path)


def test_clips_staged_from_another_input_are_swept(
    tmp_path: Path, settings: StoreSettings, clip_of: ClipOf
) -> None:
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    _stage(writer, ["a", "b"], clip_of)
    assert _staged(writer, ["a", "b", "bad"], source="another.tar") == []


def test_a_failed_write_can_be_tried_again(
    tmp_path: Path,
    settings: StoreSettings,
    clip_of: ClipOf,
    files_of: FilesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    writer = StoreWriter.open(tmp_path / "full", settings, provenance={})
    with writer.shard("0", source="0") as shard:
        shard.add("a", clip_of("a"))
        with monkeypatch.context() as patch:
            patch.setattr("cache_schema.staging.write_whole", fail)
            with pytest.raises(OSError, match="No space left"):
                shard.add("never", clip_of("never"))
        assert not shard.has("never")
        shard.commit()
    assert StoreReader(writer.path).keys == ("a",)
    other = StoreWriter.open(tmp_path / "roomy", settings, provenance={})
    with other.shard("0", source="0") as shard:
        shard.add("a", clip_of("a"))
        shard.commit()
    assert files_of(writer.path) == files_of(other.path)


def test_an_exception_keeps_what_is_staged_and_lets_go_of_the_shard(
    tmp_path: Path, settings: StoreSettings, clip_of: ClipOf
) -> None:
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    with pytest.raises(CacheError, match="out of memory"), writer.shard("0", source="0") as shard:
        shard.add("a", clip_of("a"))
        raise CacheError("out of memory")
    assert _staged(writer, ["a"], source="0") == ["a"]


def test_deleting_a_commit_record_makes_the_shard_again(
    store: Path, settings: StoreSettings, write_shard: Callable[..., None], files_of: FilesOf
) -> None:
    before = files_of(store)
    (store / "commits" / "00000.json").unlink()
    assert StoreReader(store).keys == ("b0", "b1")
    (problem,) = verify_store(store).problems
    assert problem.shard == "00000"
    assert "no commit record" in problem.what
    writer = StoreWriter.open(store.parent, settings, provenance={})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    assert files_of(store) == before
