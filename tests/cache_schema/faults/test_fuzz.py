"""Random changes to a store, accidental or deliberate: each read is correct or refused.

The store has a history: a clip of its first shard was dropped after the first state was kept, so
that older records, groups and indexes can be put back. Every clip is read whole and in parts, from
the folder and through its index as behind a URL; then verified, repaired, and read once more.
"""

import copy
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import CacheError, StoreReader, verify_store
from cache_schema import schema as settings_module
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.faults.small_store import SHARDS, clip_of, write_all
from tests.cache_schema.made_stores import files_of
from tests.cache_schema.tampering import seal

DROPPED = "a1"
KEYS = sorted(key for keys in SHARDS.values() for key in keys if key != DROPPED)
ODD_VALUES: tuple[Any, ...] = (
    -1,
    0,
    1,
    10**12,
    10**30,
    1.5,
    True,
    None,
    "",
    "../x",
    "a0",
    "0" * 8,
    [],
    {},
    "\x1b",
)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The store as it is and as it was; features lie in three inner chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings_module, "MAX_SHARED_CHUNK_BYTES", 48)
        settings_module._chunk_length.cache_clear()
        now = write_all(tmp_path_factory.mktemp("now"))
        before = shutil.copytree(now, tmp_path_factory.mktemp("before") / now.name)
        drop_clips(now, [DROPPED], detail="must not come back")
        yield now, before
    settings_module._chunk_length.cache_clear()


class Fuzz:
    """One change to a store, chosen by a seed."""

    def __init__(self, store: Path, before: Path, seed: int) -> None:
        self.store, self.before = store, before
        self.chance = random.Random(seed)
        self.is_harmless = False
        """Whether readers are not concerned, and the next extraction makes it good."""
        kinds: list[Callable[[], None]] = [
            self.flip,
            self.zero,
            self.resize,
            self.delete,
            self.swap,
            self.duplicate,
            self.put_back,
            self.put_back_a_shard,
            self.edit,
            self.edit,
            self.exchange_entries,
            self.folders,
            self.odd_file,
        ]
        self.kind = kinds[seed % len(kinds)]

    def files(self, pattern: str = "**/*") -> list[Path]:
        return sorted(
            path
            for path in self.store.glob(pattern)
            if path.is_file() and ".staging" not in path.parts
        )

    def one(self, pattern: str = "**/*") -> Path:
        """A file; each sort of them as often as the others, where any will do."""
        if pattern == "**/*":
            pattern = self.chance.choice(
                ["shards/**/c.*", "shards/**/zarr.json", "commits/*", "index.npz", "store.json"]
            )
        return self.chance.choice(self.files(pattern))

    def flip(self) -> None:
        path = self.one()
        data = bytearray(path.read_bytes())
        data[self.chance.randrange(len(data))] ^= self.chance.choice(
            [1 << self.chance.randrange(8), 0xFF]
        )
        path.write_bytes(data)

    def zero(self) -> None:
        path = self.one()
        data = path.read_bytes()
        start = self.chance.randrange(len(data))
        size = min(self.chance.choice([4, 16, 64, 512, 4096]), len(data) - start)
        path.write_bytes(data[:start] + bytes(size) + data[start + size :])

    def resize(self) -> None:
        path = self.one()
        data = path.read_bytes()
        path.write_bytes(
            self.chance.choice(
                [data[: self.chance.randrange(len(data))], data + b"\0", b"", data + data]
            )
        )

    def delete(self) -> None:
        path = self.one()
        path.unlink()
        self.is_harmless = path.name == "index.npz"

    def two(self) -> tuple[Path, Path]:
        groups = ["shards/*/features/c.*", "shards/*/mask/c.*", "shards/*/flow/c.*"]
        groups += ["commits/*", "shards/*/features/zarr.json", "shards/**/*"]
        first, second = self.chance.sample(self.files(self.chance.choice(groups)), 2)
        return first, second

    def swap(self) -> None:
        first, second = self.two()
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)

    def duplicate(self) -> None:
        first, second = self.two()
        second.write_bytes(first.read_bytes())

    def put_back(self) -> None:
        path = self.chance.choice(["commits/00000.json", "index.npz", "commits", "shards/00000"])
        self.restore(path)
        self.is_harmless = path == "index.npz"

    def put_back_a_shard(self) -> None:
        """An older state that is whole."""
        self.restore("commits/00000.json")
        self.restore("shards/00000")

    def restore(self, path: str) -> None:
        source, target = self.before / path, self.store / path
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)

    def edit(self) -> None:
        """A value of a record becomes another one, and the checksum is made anew."""
        path = self.one(self.chance.choice(["commits/*", "store.json"]))
        record = json.loads(path.read_bytes())
        places = list(_leaves(record))
        holder, name = self.chance.choice(places)
        other = self.chance.choice(places)
        holder[name] = self.chance.choice([*ODD_VALUES, copy.deepcopy(other[0][other[1]])])
        path.write_bytes(seal(record))

    def exchange_entries(self) -> None:
        """Two clips of a shard exchange what is recorded of them."""
        path = self.one("commits/*")
        record = json.loads(path.read_bytes())
        one, other = record["clips"][:2]
        name = self.chance.choice(["key", "attributes", "fingerprint", "arrays"])
        one[name], other[name] = other[name], one[name]
        if name == "arrays" and self.chance.random() < 0.5:
            for array in one[name]:
                paths = [clip[name][array]["path"] for clip in (other, one)]
                one[name][array]["path"], other[name][array]["path"] = paths
        path.write_bytes(seal(record))

    def folders(self) -> None:
        shards = self.store / "shards"
        choice = self.chance.randrange(7)
        if choice == 0:
            shutil.rmtree(self.chance.choice(sorted(shards.iterdir())))
        elif choice == 1:
            shutil.rmtree(self.chance.choice([shards, self.store / "commits"]))
        elif choice == 2:
            shutil.copytree(shards / "00001", shards / "00001~3")
        elif choice == 3:
            shutil.copyfile(self.store / "commits/00001.json", self.store / "commits/00002.json")
        elif choice == 4:
            (shards / "00000").rename(shards / "x")
            (shards / "00001").rename(shards / "00000")
            (shards / "x").rename(shards / "00001")
        elif choice == 5:
            (shards / "00001").rename(shards / "00001~1")
        else:
            shutil.copytree(shards / "00001", shards / "00009")

    def odd_file(self) -> None:
        path = self.one()
        path.unlink()
        self.chance.choice([os.mkfifo, os.mkdir, lambda at: at.symlink_to("/dev/zero")])(path)


def _leaves(record: Any) -> Iterator[tuple[Any, Any]]:
    """Holder and name of every value of a record."""
    pairs = record.items() if isinstance(record, dict) else enumerate(record)
    for name, value in list(pairs):
        if name in ("crc32c", "schema_version") and "settings_hash" in record:
            continue
        yield record, name
        if isinstance(value, dict | list):
            yield from _leaves(value)


def _read_one(reader: StoreReader, key: str, name: str) -> np.ndarray:
    return reader.read(key, [name])[name]


def _read_everything(store: Path | str, *, keys_of: Sequence[Sequence[str]] = ()) -> None:
    """Every answer is what was committed, or an error; none is about fewer clips without one.

    `keys_of` are the sets of keys that a store may show; without any, all parts of the true one.
    """
    try:
        reader = StoreReader(store)
        keys = list(reader.keys)
    except CacheError:
        return
    assert keys in keys_of if keys_of else set(keys) <= set(KEYS)
    for key in keys:
        expected = clip_of(key)
        for name, values in expected.items():
            _assert_equal_or_refused(partial(_read_one, reader, key, name), values)
            for start, stop in itertools.combinations(range(len(values) + 1), 2):
                part = partial(reader.read_part, key, name, start, stop)
                _assert_equal_or_refused(part, values[start:stop])
        try:
            attributes = reader.record(key).attributes
        except CacheError:
            continue
        assert attributes == {"source_fps": 29.97}


def _assert_equal_or_refused(read: Callable[[], np.ndarray], expected: np.ndarray) -> None:
    try:
        found = read()
    except CacheError:
        return
    np.testing.assert_array_equal(found, expected, strict=True)


def _is_reported(store: Path) -> bool:
    """Whether `cache verify` would exit with 1."""
    try:
        problems = verify_store(store).problems
    except CacheError:
        return True
    return any(problem.remedy != "extract" for problem in problems)


def test_a_changed_store_is_never_misread_always_reported_and_mended_or_told(
    fuzz: int, tmp_path: Path, history: tuple[Path, Path]
) -> None:
    now, before = history
    (tmp_path / "beside").write_text("nobody's business")
    store = shutil.copytree(now, tmp_path / "cache" / now.name)
    change = Fuzz(store, before, fuzz)
    change.kind()
    changed = files_of(store)
    is_changed = changed != files_of(now) or change.kind == change.odd_file

    _read_everything(store, keys_of=[KEYS])
    # Behind a URL the index decides, which can be older.
    older = [sorted([*KEYS, DROPPED])] if change.is_harmless else []
    _read_everything(f"file://{store}", keys_of=[KEYS, *older])
    assert _is_reported(store) == (is_changed and not change.is_harmless)
    assert files_of(store) == changed

    try:
        remaining = repair_store(store).remaining
    except CacheError:
        pass  # it says so, and exits with 1
    else:
        is_told = any(problem.remedy != "extract" for problem in remaining)
        assert is_told or not _is_reported(store)
    _read_everything(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "cache"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [store.name]
    assert (tmp_path / "beside").read_text() == "nobody's business"
