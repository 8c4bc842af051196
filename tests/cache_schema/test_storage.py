"""Stores behind URLs: a web server with many kinds of failure, and an object store."""

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import (
    ClipMissing,
    CorruptClip,
    CorruptRecord,
    StoreNotFound,
    StoreReader,
    StoreUnreachable,
    find_store,
    list_stores,
    storage,
)
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.storage import FsspecStorage, LocalStorage, is_url, open_storage
from tests.cache_schema.made_stores import clip_of
from tests.cache_schema.servers import FileServer, serving

CHUNK = "shards/00000/features/c.1.0.0.0.0"


@pytest.fixture
def web(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """The cache folder on a web server."""
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01, 0.02))
    with serving(indexed.parent) as server:
        yield server


@pytest.fixture
def s3(indexed: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a copy of the cache folder in a bucket."""
    import s3fs

    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01, 0.02))
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    name = f"bucket-{os.getpid()}-{abs(hash(indexed)) % 10**9}"
    bucket.mkdir(name)
    for path in indexed.rglob("*"):
        if path.is_file():
            bucket.pipe_file(
                f"{name}/cache/{path.relative_to(indexed.parent).as_posix()}", path.read_bytes()
            )
    yield f"s3://{name}/cache"
    bucket.rm(name, recursive=True)


@pytest.fixture(params=["web", "s3"])
def cache_url(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return found.url if isinstance(found, FileServer) else found


def _store_of(url: str, indexed: Path) -> Path | str:
    return find_store(url, "teacher", folder=indexed.name)


def test_a_store_behind_a_url_reads_as_the_folder_does(cache_url: str, indexed: Path) -> None:
    local, remote = StoreReader(indexed), StoreReader(_store_of(cache_url, indexed), kind="teacher")
    assert remote.path == f"{cache_url}/{indexed.name}"
    assert remote.name == local.name
    assert remote.keys == local.keys
    assert remote.skipped == local.skipped
    assert remote.shards == local.shards
    assert remote.num_bytes == local.num_bytes
    assert remote.settings == local.settings
    assert remote.provenance == local.provenance
    for key in remote.keys:
        for name, values in clip_of(key).items():
            np.testing.assert_array_equal(remote.read(key)[name], values, strict=True)
        part = remote.read_part(key, "features", 1, 3)
        np.testing.assert_array_equal(part, clip_of(key)["features"][1:3], strict=True)
        assert remote.record(key) == local.record(key)


def _send_all(reader: StoreReader, results: Connection) -> None:
    results.send({key: reader.read(key)["features"].tobytes() for key in reader.keys})


@pytest.mark.parametrize(
    ("method", "used_before"), [("fork", False), ("fork", True), ("spawn", True)]
)
def test_a_reader_of_a_url_works_in_other_processes(
    cache_url: str, indexed: Path, method: str, used_before: bool
) -> None:
    context: Any = multiprocessing.get_context(method)
    reader = StoreReader(_store_of(cache_url, indexed))
    if used_before:
        reader.read("a0")
    receive, send = context.Pipe(duplex=False)
    processes = [context.Process(target=_send_all, args=(reader, send)) for _ in range(2)]
    for process in processes:
        process.start()
    expected = {key: clip_of(key)["features"].tobytes() for key in reader.keys}
    for _ in processes:
        assert receive.poll(60)
        assert receive.recv() == expected
    for process in processes:
        process.join()
        assert process.exitcode == 0
    reader.read("b1")  # its own connections are as they were
    assert pickle.loads(pickle.dumps(reader)).keys == reader.keys


def _damage_remote(url: str, path: str, data: bytes | None, indexed: Path) -> None:
    """Replace a file of the store, or delete it, as the server of this URL has it."""
    if url.startswith("http"):
        file = indexed / path
        file.unlink() if data is None else file.write_bytes(data)
        return
    import s3fs

    bucket = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    full = f"{url.removeprefix('s3://')}/{indexed.name}/{path}"
    bucket.rm_file(full) if data is None else bucket.pipe_file(full, data)


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "flipped", "other"])
def test_damaged_objects_are_never_misread(cache_url: str, indexed: Path, damage: str) -> None:
    good = (indexed / CHUNK).read_bytes()
    data = {
        "missing": None,
        "empty": b"",
        "short": good[: len(good) // 2],
        "long": good + b"\0",
        "flipped": good[:50] + bytes([good[50] ^ 1]) + good[51:],
        "other": (indexed / CHUNK.replace("/c.1.", "/c.0.")).read_bytes(),
    }[damage]
    _damage_remote(cache_url, CHUNK, data, indexed)
    reader = StoreReader(_store_of(cache_url, indexed))
    with pytest.raises(CorruptClip, match=r"'a1' in shard '00000'") as error:
        reader.read("a1")
    assert error.value.remedy == "repair"
    assert f"{cache_url}/{indexed.name}" in str(error.value)
    if damage not in ("long", "other"):  # their part of the bytes is right, or looks so
        with pytest.raises(CorruptClip):
            reader.read_part("a1", "features", 0, 2)
    reader.read("a0")


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_an_index_that_cannot_be_trusted_is_an_error_behind_a_url(
    cache_url: str, indexed: Path, damage: str
) -> None:
    good = (indexed / "index.npz").read_bytes()
    middle = good.index(b"a0a1a2b0b1")
    data = {
        "missing": None,
        "empty": b"",
        "flipped": good[:middle] + b"b" + good[middle + 1 :],
    }[damage]
    _damage_remote(cache_url, "index.npz", data, indexed)
    reader = StoreReader(_store_of(cache_url, indexed))
    with pytest.raises(CorruptRecord, match=r"index\.npz") as error:
        assert reader.keys
    assert error.value.remedy == "copy"


def test_a_url_without_a_store_is_no_store(cache_url: str) -> None:
    for folder in ("teacher-nothere", "."):
        with pytest.raises(StoreNotFound):
            StoreReader(find_store(cache_url, "teacher", folder=folder))


def test_answers_that_fail_at_first_are_asked_for_again(web: FileServer, indexed: Path) -> None:
    reader = StoreReader(_store_of(web.url, indexed))
    assert len(reader) == 5
    for states in ([500], [503, 429], [502, 500]):
        web.failures = {CHUNK: list(states)}
        web.requests.clear()
        np.testing.assert_array_equal(reader.read("a1")["mask"], clip_of("a1")["mask"])
        assert sum(path.endswith(CHUNK) for path, _ in web.requests) == len(states) + 1
    web.failures = {CHUNK: [500]}
    part = reader.read_part("a1", "features", 0, 1)
    np.testing.assert_array_equal(part, clip_of("a1")["features"][:1])


@pytest.mark.parametrize(("state", "requests"), [(500, 3), (429, 3), (403, 1), (401, 1)])
def test_a_server_that_never_answers_properly_is_no_damage(
    web: FileServer, indexed: Path, state: int, requests: int
) -> None:
    reader = StoreReader(_store_of(web.url, indexed))
    assert len(reader) == 5
    web.failures = {CHUNK: [-state]}
    for ask in (lambda: reader.read("a1"), lambda: reader.read_part("a1", "features", 0, 1)):
        web.requests.clear()
        with pytest.raises(StoreUnreachable, match=f"{CHUNK} could not be read .*{state}"):
            ask()
        assert len(web.requests) == requests


def test_a_connection_that_breaks_off_is_no_answer(web: FileServer, indexed: Path) -> None:
    reader = StoreReader(_store_of(web.url, indexed))
    assert len(reader) == 5
    web.cut = {CHUNK: 20}
    with pytest.raises(StoreUnreachable):
        reader.read("a1")
    with pytest.raises(StoreUnreachable):
        reader.read_part("a1", "features", 0, 3)


def test_a_server_that_is_gone_is_no_damage(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01,))
    with serving(indexed.parent) as server:
        reader = StoreReader(_store_of(server.url, indexed))
        assert len(reader) == 5
    with pytest.raises(StoreUnreachable, match="could not be read"):
        reader.read("a1")
    with pytest.raises(StoreUnreachable, match=r"store\.json could not be read"):
        StoreReader(_store_of(server.url, indexed))


def test_a_server_without_ranges_gives_parts_too(web: FileServer, indexed: Path) -> None:
    web.ranges = False
    reader = StoreReader(_store_of(web.url, indexed))
    part = reader.read_part("a1", "features", 1, 2)
    np.testing.assert_array_equal(part, clip_of("a1")["features"][1:2])


def test_a_clip_is_one_request_and_a_part_two(web: FileServer, indexed: Path) -> None:
    reader = StoreReader(_store_of(web.url, indexed))
    assert len(reader) == 5
    web.requests.clear()
    reader.read("a1")
    assert [path.split("/")[4] for path, _ in web.requests] == ["features", "mask"]
    web.requests.clear()
    reader.read_part("a1", "features", 0, 1)
    assert [path.endswith(CHUNK) for path, _ in web.requests] == [True, True]
    assert all(asked is not None for _, asked in web.requests)


def test_a_web_server_needs_the_folder_to_be_named(web: FileServer) -> None:
    with pytest.raises(StoreNotFound, match="cannot be listed") as error:
        find_store(web.url, "teacher")
    assert (error.value.remedy, error.value.subject) == ("choose", "teacher")
    with pytest.raises(StoreNotFound, match="name the folder"):
        list_stores(web.url)


def test_an_object_store_is_listed(s3: str, indexed: Path) -> None:
    assert list_stores(s3) == [f"{s3}/{indexed.name}"]
    assert find_store(s3, "teacher") == f"{s3}/{indexed.name}"
    assert list_stores(f"{s3}/nothing") == []
    with pytest.raises(StoreNotFound, match="no latents store"):
        find_store(s3, "latents")
    place = open_storage(f"{s3}/{indexed.name}/")
    assert place.list_folder("commits") == ["00000.json", "00001.json"]
    assert place.list_folder("nowhere") == []


def test_a_shard_replaced_behind_a_url_is_read_from_its_next_generation(
    cache_url: str, indexed: Path
) -> None:
    reader = StoreReader(_store_of(cache_url, indexed))
    assert len(reader) == 5
    drop_clips(indexed, ["a0"], detail="blurred")
    if cache_url.startswith("s3"):
        copy_store(indexed, f"{cache_url}/{indexed.name}")
    for key in ("a1", "a2", "b0"):
        np.testing.assert_array_equal(reader.read(key)["features"], clip_of(key)["features"])
    with pytest.raises(ClipMissing, match="since the store was opened"):
        reader.read("a0")


def test_places_say_the_same_of_files_and_ranges(
    cache_url: str, indexed: Path, tmp_path: Path
) -> None:
    local: Any = LocalStorage(indexed)
    for place in (local, open_storage(f"{cache_url}/{indexed.name}")):
        data = place.read("store.json")
        assert data == (indexed / "store.json").read_bytes()
        assert place.read_range("store.json", 3, 10) == data[3:10]
        assert place.read_range("store.json", 5, 5) == b""
        assert place.read_range("store.json", len(data) - 2, len(data) + 9) == data[-2:]
        assert place.read_range("store.json", len(data) + 1, len(data) + 9) == b""
        for ask in (place.read, lambda path, p=place: p.read_range(path, 0, 4), place.open):
            with pytest.raises(FileNotFoundError):
                ask("nothing/here")
    assert is_url(cache_url)
    assert not is_url(indexed)
    assert not is_url("relative/folder")
    assert LocalStorage(tmp_path).list_folder("nowhere") == []


def test_a_place_behind_a_url_asks_nothing_before_it_is_asked() -> None:
    place = FsspecStorage("http://127.0.0.1:1/nothing")
    assert pickle.loads(pickle.dumps(place)).location == "http://127.0.0.1:1/nothing"
