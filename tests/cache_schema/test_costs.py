"""Cost of operations on a growing store, in counted file operations instead of seconds.

Counted are calls of Python and C functions, files opened, names listed and syncs. With twice the
shards, or twice the clips in one shard, each may at most double.
"""

import concurrent.futures.thread
import gc
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreSettings, StoreWriter, records, verify_store
from cache_schema import index as clip_index
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import change_fingerprints, drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from tests.fingerprints import fingerprint_of

SETTINGS = StoreSettings(
    kind="teacher",
    arrays={
        "features": ArraySpec(dtype="float16", shape=(2, 2), dimension_names=("t", "c")),
        "valid": ArraySpec(dtype="uint8", shape=(2,), dimension_names=("t",)),
    },
    values={},
)
ZEROS = {name: np.zeros(spec.shape, spec.dtype) for name, spec in SETTINGS.arrays.items()}
NUMBER = 6
"""Of shards, or of clips in one; what more of them cost is compared with what these did."""

WAITING = {threading.__file__, queue.__file__, concurrent.futures.thread.__file__}
WAITING |= {concurrent.futures._base.__file__}

Command = Callable[[Path, list[str]], object]
Shape = Callable[[int], tuple[int, int]]


class Listing:
    """What `os.scandir` gives, listed at once."""

    def __init__(self, entries: list[os.DirEntry[Any]]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry[Any]]:
        return self._entries

    def __next__(self) -> os.DirEntry[Any]:
        return next(self._entries)

    def __enter__(self) -> "Listing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    listdir, scandir, opened = os.listdir, os.scandir, os.open

    def counted_listdir(path: Any = ".") -> list[Any]:
        names = listdir(path)
        counts["names"] += len(names)
        return names

    def counted_scandir(path: Any = ".") -> Listing:
        with scandir(path) as entries:
            found = list(entries)
        counts["names"] += len(found)
        return Listing(found)

    def counted_open(*args: Any, **options: Any) -> int:
        counts["opened"] += 1
        return opened(*args, **options)

    def count_sync(descriptor: int) -> None:
        counts["syncs"] += 1

    def on_call(frame: FrameType, event: str, argument: object) -> None:
        # How often a thread waits for another one depends on the load of the machine.
        if event in ("call", "c_call") and frame.f_code.co_filename not in WAITING:
            counts["calls"] += 1

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", counted_listdir)
        patch.setattr(os, "scandir", counted_scandir)
        patch.setattr(os, "open", counted_open)
        patch.setattr(os, "fsync", count_sync)
        # A collection calls the finalizers of whatever garbage earlier tests left.
        gc.collect()
        gc.disable()
        sys.setprofile(on_call)
        try:
            yield counts
        finally:
            sys.setprofile(None)
            gc.enable()


def make_store(cache: Path, num_shards: int, num_clips: int) -> tuple[Path, list[str]]:
    writer = StoreWriter.open(cache, SETTINGS, provenance={})
    first = []
    for number in range(num_shards):
        with writer.shard(f"{number:05d}", source="s") as shard:
            for index in range(num_clips):
                key = f"{number:05d}/{index:05d}"
                shard.add(key, ZEROS, {"num_frames": 2}, fingerprint=fingerprint_of(key))
            shard.skip(f"{number:05d}/no", "too_short", "", fingerprint=fingerprint_of("no"))
            shard.commit()
        first.append(f"{number:05d}/00000")
    writer.write_index()
    return writer.path, first


def drop(store: Path, first: list[str]) -> None:
    drop_clips(store, first, detail="")


def rebind(store: Path, first: list[str]) -> None:
    change_fingerprints(store, dict.fromkeys(first, fingerprint_of("another")))


def verify(store: Path, first: list[str]) -> None:
    assert not verify_store(store).problems


def merge(store: Path, first: list[str]) -> None:
    merge_stores(store.parent / "merged" / store.name, [store])


def copy(store: Path, first: list[str]) -> None:
    copy_store(store, store.parent / "copied" / store.name)


def repair_clips(store: Path, first: list[str]) -> None:
    for file in store.glob("shards/*/features/c.0.0.0"):
        file.write_bytes(b"damaged")
    assert len(repair_store(store).clips) == len(first)


def repair_shards(store: Path, first: list[str]) -> None:
    drop_clips(store, first, detail="")
    for record in store.glob("commits/*"):
        record.write_bytes(b"damaged")
    assert len(repair_store(store).shards) == len(first)


def write_again(store: Path, first: list[str]) -> None:
    """A store of the same shards and clips."""
    num_shards = len(first)
    num_clips = sum(1 for _ in store.glob("shards/00000/valid/c.*"))
    make_store(store.parent / "second", num_shards, num_clips)


def more_shards(number: int) -> tuple[int, int]:
    return number, 1


def more_clips(number: int) -> tuple[int, int]:
    return 1, number


COMMANDS = [drop, rebind, verify, merge, copy, repair_clips, repair_shards]


@pytest.mark.parametrize(
    ("command", "shape"),
    [*product(COMMANDS, [more_shards, more_clips]), (write_again, more_clips)],
)
def test_twice_the_store_is_at_most_twice_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, shape: Shape
) -> None:
    costs = []
    for number in (1, NUMBER, 2 * NUMBER, 4 * NUMBER):  # the first for imports and caches
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            store, first = make_store(tmp_path / str(number), *shape(number))
        with counting(monkeypatch) as counts:
            command(store, first)
        costs.append(counts)
    _, less, middle, most = costs
    for what in most:
        more, before = most[what] - middle[what], middle[what] - less[what]
        assert more <= 2.3 * before + 4, (what, costs)


def test_a_drop_reads_each_record_once_and_waits_for_the_disk_twice_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first = make_store(tmp_path, NUMBER, 2)
    read: Counter[str] = Counter()
    for module in (records, clip_index):
        parse = module.parse_commit

        def counted(*args: Any, parse: Any = parse, **options: Any) -> Any:
            read[args[2]] += 1
            return parse(*args, **options)

        monkeypatch.setattr(module, "parse_commit", counted)
    with counting(monkeypatch) as counts:
        drop(store, first[1:])
    assert read == dict.fromkeys((key.split("/")[0] for key in first[1:]), 1)
    record_and_its_folder, folders_of_arrays, of_the_index = 2, len(SETTINGS.arrays), 2
    assert counts["syncs"] == (record_and_its_folder + folders_of_arrays) * 5 + of_the_index
