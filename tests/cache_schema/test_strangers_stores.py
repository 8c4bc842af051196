"""Stores from untrusted sources cannot escape their folder, block, or exhaust memory."""

import copy
import functools
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cache_schema import (
    ArraySpec,
    CacheError,
    CorruptClip,
    CorruptRecord,
    StoreReader,
    StoreSettings,
    StoreWriter,
    find_store,
    verify_store,
)
from cache_schema.index_columns import DamagedIndex, read_columns
from cache_schema.maintenance.copy import copy_store
from cache_schema.names import MAX_RECORD_BYTES
from cache_schema.zarr_shard import found_compression
from tests.cache_schema.made_stores import SETTINGS, files_of, write_shard
from tests.cache_schema.servers import serving
from tests.cache_schema.tampering import seal, tamper, tamper_index


def test_a_copy_from_a_web_server_writes_and_removes_nothing_outside_its_target(
    indexed: Path, tmp_path: Path
) -> None:
    tamper_index(indexed, shards__name=["../../home", "00001"])
    target = tmp_path / "target" / indexed.name
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    before = files_of(tmp_path)
    with serving(indexed.parent) as server, pytest.raises(CorruptRecord, match="home"):
        copy_store(f"{server.url}/{indexed.name}", target)
    assert files_of(tmp_path) == before


def test_a_store_that_a_listing_calls_dots_is_not_one(store: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    root = MemoryFileSystem()
    root.pipe_file("/dots/../store.json", (store / "store.json").read_bytes())
    with pytest.raises(CacheError, match="no teacher store"):
        find_store("memory://dots", "teacher")
    root.rm("/dots", recursive=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"shards__name": ["../x", "00001"]},
        {"shards__name": ["/etc", "00001"]},
        {"shards__name": ["00001", "00000"]},
        {"shards__name": ["00000", "00000"]},
        {"shards__generation": [2**31, 0]},
        {"keys": ["../x", "a1", "a2", "b0", "b1"]},
        {"keys": ["a0", "a1", "a2", "b/../../0", "b1"]},
        {"keys": ["/a0", "a1", "a2", "b0", "b1"]},
        {"keys": ["", "a1", "a2", "b0", "b1"]},
        {"keys": ["a0", "a1", "a2", "b\n", "b1"]},
        {"keys": ["a0", "a1", "a2", "b\x85", "b1"]},
        {"keys": ["a0", "a1", "a2", "b0", "b" * 1025]},
        {"keys": ["a0", "a1", "a2", "b0", b"b\xff"]},
        {"keys": ["a0", "a1", "a2", b"b\xc3", b"\xa4b"]},
        {"keys": ["a1", "a0", "a2", "b0", "b1"]},
        {"keys": ["a0", "a0", "a2", "b0", "b1"]},
        {"clips__index": [0, 1, 2**31, 0, 1]},
        {"shards__group": [1, 0]},
        {"clips__shard": [0, 0, 0, 1, 2]},
        {"clips__fingerprint": ["x" * 32] * 5},
        {"arrays__features__bytes": [10**12] * 5},
        {"arrays__features__bytes": [0] * 5},
        {"skipped__reason": ["\x1b[2J"]},
        {"skipped__key": ["../a3"]},
        {"skipped__detail": [b"\xff"]},
    ],
)
def test_an_index_that_no_records_give_is_refused_behind_an_address(
    indexed: Path, changed: dict[str, Any]
) -> None:
    tamper_index(indexed, **changed)
    with serving(indexed.parent) as server, pytest.raises(CorruptRecord, match=r"index\.npz"):
        assert StoreReader(f"{server.url}/{indexed.name}").keys
    assert StoreReader(indexed).keys == ("a0", "a1", "a2", "b0", "b1")  # of the records
    assert any(problem.remedy == "repair" for problem in verify_store(indexed).problems)


def test_packed_keys_of_many_scripts_are_accepted(tmp_path: Path) -> None:
    keys = ["..a/b..", "a/.../b", "x..y", "é" * 512, "ключ/01", "日本 語", "\u00a0"]
    writer = StoreWriter.open(tmp_path, SETTINGS, provenance={})
    write_shard(writer, "0", keys)
    writer.write_index()
    with serving(tmp_path) as server:
        assert StoreReader(f"{server.url}/{writer.path.name}").keys == sorted(keys)


def test_an_index_is_never_inflated() -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("keys.text.npy", bytes(2**24))
    with pytest.raises(DamagedIndex, match="compressed"):
        read_columns(bomb.getvalue(), SETTINGS)


def test_an_index_does_not_hold_more_than_its_bytes(indexed: Path) -> None:
    data = (indexed / "index.npz").read_bytes()
    directory = data.rindex(b"PK\x01\x02")
    large = data[: directory + 20] + b"\xff\xff\xff\x7f" * 2 + data[directory + 28 :]
    with pytest.raises(DamagedIndex, match="larger than the file"):
        read_columns(large, SETTINGS)


def _nested(record: dict[str, Any]) -> None:
    for _ in range(100):
        record["provenance"] = {"more": record["provenance"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["clips"][0].update(key="../x"),
        lambda r: r["clips"][0].update(key="/x"),
        lambda r: r["skipped"][0].update(key="../x"),
        lambda r: r["skipped"][0].update(reason="\x1b[2J"),
        lambda r: r["skipped"][0].update(detail="\ud800"),
        lambda r: r["clips"][0]["arrays"]["features"].update(bytes=10**12),
        lambda r: r["clips"][0]["arrays"]["features"].update(bytes=10**30),
        lambda r: r["clips"][0]["arrays"]["features"].update(bytes=2),
        lambda r: r["files"]["zarr.json"].update(bytes=10**9),
        lambda r: r.update(generation=10**30),
        lambda r: r.update(group=1),
        lambda r: r.update(group=-1),
        lambda r: r.update(source="\ud800"),
    ],
)
def test_a_commit_record_that_no_writer_wrote_is_refused(
    store: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    tamper(store / "commits" / "00000.json", change)
    with pytest.raises(CorruptRecord, match=r"00000\.json"):
        assert StoreReader(store).keys
    assert [problem.shard for problem in verify_store(store).problems] == ["00000"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["arrays"]["features"].update(shape=[10**12, 64]),
        lambda r: r["arrays"]["features"].update(shape=[10**12, 2, 3, 4]),
        lambda r: r["arrays"]["features"].update(shape=[2**21 + 1, 2, 3, 4]),
        lambda r: r["arrays"]["features"].update(shape=[10**30, 2, 3, 4]),
        lambda r: r["arrays"]["features"].update(
            shape=[1] * 40, dimension_names=[f"d{number}" for number in range(40)]
        ),
        lambda r: r.update(arrays={f"a{n}": r["arrays"]["mask"] for n in range(65)}),
        _nested,
    ],
)
def test_a_store_file_that_asks_for_the_impossible_is_refused(
    store: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    tamper(store / "store.json", change)
    with pytest.raises(CorruptRecord, match=r"store\.json"):
        StoreReader(store)


def _parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the members of a record lie; of lists the first."""
    found: Any = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for name, item in found:
        yield (*path, name)
        if isinstance(item, dict | list):
            yield from _parts(item, (*path, name))


STRANGE: list[Any] = [10**30, -1, 1.5, float("nan"), None, True, "x", [], {"a": [1]}, [[[]]] * 2]


@pytest.mark.parametrize("name", ["store.json", "commits/00000.json"])
def test_records_of_any_content_are_read_or_refused_with_the_store(store: Path, name: str) -> None:
    record = json.loads((store / name).read_bytes())
    for path in _parts(record):
        for value in STRANGE:
            changed = copy.deepcopy(record)
            place = changed
            for part in path[:-1]:
                place = place[part]
            place[path[-1]] = value
            with suppress(Exception):  # so that more than the hash beside them is wrong
                changed["settings_hash"] = StoreSettings.from_dict(changed).hash
            (store / name).write_bytes(seal(changed))
            for use in (_use, functools.partial(verify_store, fast=True)):
                try:
                    use(store)
                except CacheError as error:
                    assert str(store) in str(error), (path, value)


def _use(store: Path) -> None:
    reader = StoreReader(store)
    assert reader.num_bytes > 0
    assert reader.provenance is not None
    for key in tuple(reader.keys):
        reader.read(key)


@pytest.mark.parametrize("name", ["store.json", "commits/00000.json"])
def test_json_nested_without_end_is_refused(store: Path, name: str) -> None:
    (store / name).write_bytes(b"[" * 10**6)
    with pytest.raises(CorruptRecord, match="not JSON"):
        assert StoreReader(store).keys


@pytest.mark.parametrize(
    "spec", [{"shape": (2**33, 2)}, {"shape": (1,) * 17}, {"shape": (2**20 + 7, 2**8)}]
)
def test_an_array_too_large_for_a_clip_is_refused(spec: dict[str, Any]) -> None:
    names = tuple(f"d{number}" for number in range(len(spec["shape"])))
    with pytest.raises(ValueError, match="at most"):
        ArraySpec(dtype="uint8", dimension_names=names, **spec)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_RECORD_BYTES + 1)


def _folder(path: Path) -> None:
    path.mkdir()


ODD_FILES = [_fifo, _endless, _folder]


@pytest.mark.parametrize("make", [*ODD_FILES, _sparse])
@pytest.mark.parametrize("name", ["store.json", "commits/00000.json"])
def test_what_is_no_file_of_a_store_is_no_record(
    store: Path, name: str, make: Callable[[Path], None]
) -> None:
    (store / name).unlink()
    make(store / name)
    with pytest.raises(CorruptRecord, match="cannot be read"):
        assert StoreReader(store).keys
    if name == "store.json":
        with pytest.raises(CorruptRecord, match="cannot be read"):
            verify_store(store)
    else:
        assert [problem.shard for problem in verify_store(store).problems] == ["00000"]


@pytest.mark.parametrize("make", ODD_FILES)
def test_what_is_no_file_of_a_store_is_no_clip_and_no_index(
    indexed: Path, make: Callable[[Path], None]
) -> None:
    for path in ("index.npz", "shards/00000/features/c.1.0.0.0.0", "shards/00000/mask/zarr.json"):
        (indexed / path).unlink()
        make(indexed / path)
    reader = StoreReader(indexed)
    assert len(reader) == 5
    with pytest.raises(CorruptClip):
        reader.read("a1")
    with pytest.raises(CorruptClip):
        reader.read_part("a1", "features", 0, 1)
    for fast in (False, True):
        found = {(p.shard, p.key) for p in verify_store(indexed, fast=fast).problems}
        assert found == {(None, None), ("00000", None), ("00000", "a1")}


@pytest.mark.parametrize("make", [*ODD_FILES, _sparse])
def test_what_is_no_file_of_a_store_tells_no_compression(
    store: Path, make: Callable[[Path], None]
) -> None:
    file = store / "shards" / "00000" / "mask" / "zarr.json"
    assert found_compression(file.parent.parent, "mask") is not None
    file.unlink()
    make(file)
    assert found_compression(file.parent.parent, "mask") is None


def test_a_web_server_that_sends_without_end_is_not_listened_to(indexed: Path) -> None:
    with serving(indexed.parent) as server:
        reader = StoreReader(f"{server.url}/{indexed.name}")
        assert len(reader) == 5
        server.endless = {"00000/features/c.1.0.0.0.0"}
        with pytest.raises(CorruptClip, match="bytes instead of"):
            reader.read("a1")
        with pytest.raises(CorruptClip):
            reader.read_part("a1", "features", 0, 1)
        problems = verify_store(f"{server.url}/{indexed.name}").problems
        assert [problem.key for problem in problems] == ["a1"]
        server.endless = {"store.json"}
        with pytest.raises(CorruptRecord, match=r"store\.json cannot be read"):
            StoreReader(f"{server.url}/{indexed.name}")
