"""A write that the disk refuses is told with the file, whoever writes."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from cache_schema.atomic_io import write_atomic
from pipeline.failures import error_text
from stages.clips.video.encoding import write_video
from stages.extract_features.summary import write_failure_manifest
from stages.train_student.logging.rows import RowFile

SETTINGS = StoreSettings(
    kind="teacher",
    arrays={"f": ArraySpec(dtype="uint8", shape=(4, 4096), dimension_names=("t", "c"))},
    values={},
)


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """The system refuses to make any file longer, without its name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_sync(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.context() as inner:
        inner.setattr(os, "fsync", fail)
        yield


def store_with_a_clip(folder: Path) -> StoreWriter:
    writer = StoreWriter.open(folder, SETTINGS, provenance={})
    with writer.shard("00000", source="a.tar") as shard:
        add(shard, "a")
        shard.commit()
    return writer


def add(shard: object, key: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4096), np.uint8)
    shard.add(key, {"f": noise}, {}, fingerprint="0" * 32)  # type: ignore[attr-defined]


def a_record(folder: Path) -> Callable[[], None]:
    return lambda: write_atomic(folder / "r.json", b"x" * 9000, temporary=folder / ".r")


def a_store(folder: Path) -> Callable[[], None]:
    def work() -> None:
        StoreWriter.open(folder, SETTINGS, provenance={"note": "x" * 9000})

    return work


def a_clip(folder: Path) -> Callable[[], None]:
    writer = store_with_a_clip(folder)

    def work() -> None:
        with writer.shard("00001", source="b.tar") as shard:
            add(shard, "b")

    return work


def an_index(folder: Path) -> Callable[[], None]:
    return store_with_a_clip(folder).write_index


def a_list_of_failures(folder: Path) -> Callable[[], None]:
    writer = StoreWriter.open(folder, SETTINGS, provenance={})
    with writer.shard("00000", source="a.tar") as shard:
        shard.skip("a", "too_short", "x" * 9000, fingerprint="0" * 32)
        shard.commit()

    def work() -> None:
        write_failure_manifest(folder, log=print)

    return work


def a_row(folder: Path) -> Callable[[], None]:
    rows = RowFile(folder / "losses.jsonl", 0, lambda: None)

    def work() -> None:
        rows.add({"step": 1, "note": "x" * 9000})
        rows.sync()

    return work


def a_video(folder: Path) -> Callable[[], None]:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    return lambda: write_video(folder / "v.mp4", noise, 8.0)


WRITERS = [a_record, a_store, a_clip, an_index, a_list_of_failures, a_row, a_video]


@pytest.mark.parametrize("make", WRITERS)
def test_a_refused_write_names_its_file(
    tmp_path: Path, make: Callable[[Path], Callable[[], None]]
) -> None:
    work = make(tmp_path)
    with no_room(100), pytest.raises(OSError) as caught:
        work()
    assert str(tmp_path) in str(caught.value.filename)
    assert error_text(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("make", [one for one in WRITERS if one is not a_video])
def test_a_refused_sync_names_its_file_and_says_what_to_do(
    tmp_path: Path, make: Callable[[Path], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make(tmp_path)
    with no_sync(monkeypatch), pytest.raises(OSError) as caught:
        work()
    words = error_text(caught.value)
    assert words.startswith(str(tmp_path))
    assert "free some space" in words


def test_names_that_lists_give_keep_their_no_break_spaces(tmp_path: Path) -> None:
    from stages.clips.dataset.csv_rows import CsvRows
    from stages.clips.dataset.rows import _parse_pair

    name = "\u00a0a\u2003.mp4\u00a0"
    file = tmp_path / "metadata.csv"
    file.write_text(f"file_name,caption\n {name}\t ,A dog\n", encoding="utf-8")
    [(_, fields)] = CsvRows(file).scan()
    assert fields()["file_name"] == name
    assert _parse_pair(b"A dog", f" {name} \r".encode())["file_name"] == name
