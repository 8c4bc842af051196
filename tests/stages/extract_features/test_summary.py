"""failures.jsonl: complete, sorted, written atomically, without clips that a retry added."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache_schema import ArraySpec, SkippedClip, StoreReader, StoreSettings, StoreWriter
from stages.extract_features import summary
from stages.extract_features.summary import (
    failure_manifest_written,
    write_failure_manifest,
)
from tests.fingerprints import fingerprint_of

VALUES = {"v": np.zeros(2, "uint8")}


def store(root: Path, kind: str) -> StoreWriter:
    spec = ArraySpec(dtype="uint8", shape=(2,), dimension_names=("n",))
    settings = StoreSettings(kind=kind, arrays={"v": spec}, values={})
    return StoreWriter.open(root, settings, provenance={})


def write(writer: StoreWriter, name: str, clips: str, skipped: str) -> None:
    with writer.shard(name, source=f"{name}.tar") as shard:
        for key in clips:
            shard.add(key, VALUES, fingerprint=fingerprint_of(key))
        for key in skipped:
            shard.skip(key, "too_short", f"{key} — 12 Bilder", fingerprint=fingerprint_of(key))
        shard.commit()


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_skipped_clip_of_every_store_is_a_line(tmp_path: Path) -> None:
    teacher, latents = store(tmp_path, "teacher"), store(tmp_path, "latents")
    write(teacher, "1", "a", "zy")
    write(teacher, "0", "b", "x")
    write(latents, "0", "x", "b")
    path = write_failure_manifest(tmp_path, print)
    assert path == tmp_path / "failures.jsonl"
    found = lines(path)
    assert [(line["kind"], line["shard"], line["key"]) for line in found] == [
        ("latents", "0", "b"),
        ("teacher", "0", "x"),
        ("teacher", "1", "y"),
        ("teacher", "1", "z"),
    ]
    assert found[1] == {
        "kind": "teacher",
        "store": teacher.path.name,
        "shard": "0",
        "source": "0.tar",
        "key": "x",
        "reason": "too_short",
        "detail": "x — 12 Bilder",
    }
    others = [entry.name for entry in tmp_path.iterdir() if entry.is_file()]
    assert others == ["failures.jsonl"]


def test_it_is_rewritten_and_empty_when_a_retry_brought_everything_in(tmp_path: Path) -> None:
    writer = store(tmp_path, "text")
    write(writer, "0", "a", "bc")
    assert len(lines(write_failure_manifest(tmp_path, print))) == 2
    write(writer, "0-retry1", "bc", "")
    assert write_failure_manifest(tmp_path, print).read_bytes() == b""


def test_it_is_written_when_the_run_stops_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), failure_manifest_written(tmp_path, print):
        write(store(tmp_path, "text"), "0", "", "k")
        raise KeyboardInterrupt
    assert [line["key"] for line in lines(tmp_path / "failures.jsonl")] == ["k"]


def test_a_damaged_store_is_told_of_and_spoils_nothing(tmp_path: Path) -> None:
    write(store(tmp_path, "text"), "0", "", "k")
    damaged = store(tmp_path, "latents").path
    (damaged / "store.json").write_text("{}")
    told: list[str] = []
    path = write_failure_manifest(tmp_path, told.append)
    assert [line["key"] for line in lines(path)] == ["k"]
    assert len(told) == 1
    assert told[0].startswith(f"failures.jsonl does not cover {damaged.name}: ")


def test_a_list_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="out of memory") as caught,
        failure_manifest_written(tmp_path, print),
    ):
        (tmp_path / "failures.jsonl").mkdir()
        raise RuntimeError("out of memory")
    assert caught.value.__notes__[0].startswith("failures.jsonl could not be written")


def test_a_list_that_did_not_change_is_not_replaced(tmp_path: Path) -> None:
    write(store(tmp_path, "text"), "0", "a", "bc")
    before = write_failure_manifest(tmp_path, print).stat()
    after = write_failure_manifest(tmp_path, print).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_failures_are_written_shard_by_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = store(tmp_path, "text")
    for number in range(4):
        write(writer, str(number), "", f"{number}")
    monkeypatch.setattr(
        StoreReader, "skipped", property(lambda _: pytest.fail("all were held together"))
    )
    given: list[str] = []
    iterate = StoreReader.iter_skipped

    def noting(reader: StoreReader) -> Iterator[SkippedClip]:
        for clip in iterate(reader):
            given.append(clip.key)
            yield clip

    monkeypatch.setattr(StoreReader, "iter_skipped", noting)
    written = summary._lines(StoreReader(writer.path))
    next(written)
    # The first of the next shard ends the one before.
    assert given == ["0", "1"]


def test_several_at_once_leave_a_whole_list(tmp_path: Path) -> None:
    writer = store(tmp_path, "text")
    write(writer, "0", "a", "bcdefgh")
    threads = [
        threading.Thread(target=write_failure_manifest, args=(tmp_path, print)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["key"] for line in lines(tmp_path / "failures.jsonl")] == list("bcdefgh")
