"""A copy holds what its source holds: on disk, over HTTP, on S3, wherever one was killed before."""

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    CacheError,
    CorruptClip,
    Refused,
    SettingsMismatch,
    StoreNotFound,
    StoreReader,
    StoreSettings,
    StoreUnreachable,
    StoreWriter,
)
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from tests.cache_schema.faults.operations import run_and_kill
from tests.fingerprints import fingerprint_of

Arrays = dict[str, np.ndarray]
ClipOf = Callable[[str], Arrays]
FilesOf = Callable[[Path], dict[str, bytes]]

KEYS = ["a0", "a1", "a2", "b0", "b1"]


def _assert_whole(store: Path | str, keys: list[str], clip_of: ClipOf) -> None:
    reader = StoreReader(store)
    assert list(reader.keys) == sorted(keys)
    for key in keys:
        for name, values in reader.read(key).items():
            np.testing.assert_array_equal(values, clip_of(key)[name])


def _travelling(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what stays at home."""
    return {p: data for p, data in files.items() if not p.startswith((".staging", "quarantine"))}


@pytest.fixture
def indexed(store: Path, settings: StoreSettings) -> Path:
    """The store with its index, and things that do not travel."""
    writer = StoreWriter.open(store.parent, settings, provenance={})
    writer.write_index()
    with writer.shard("00007", source="00007.tar"):
        pass
    (store / "quarantine" / "1").mkdir(parents=True)
    (store / "quarantine" / "1" / "00009.json").write_text("{}", "utf-8")
    return store


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address that a plain web server shows it at."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def _s3_server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket of an S3 server on this machine."""
    boto3 = pytest.importorskip("boto3")
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": _s3_server,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="clips")
    yield "s3://clips/cache"
    for path in _objects():
        client.delete_object(Bucket="clips", Key=path)
    client.delete_bucket(Bucket="clips")


def _objects() -> dict[str, bytes]:
    """Every object of the bucket, as another client sees it."""
    import boto3

    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket="clips").get("Contents", [])
    paths = [entry["Key"] for entry in listed]
    return {path: client.get_object(Bucket="clips", Key=path)["Body"].read() for path in paths}


def _store_on_s3(store: Path) -> dict[str, bytes]:
    prefix = f"cache/{store.name}/"
    return {path.removeprefix(prefix): data for path, data in _objects().items()}


def test_a_copy_has_every_file_that_travels_and_no_other(
    tmp_path: Path, indexed: Path, clip_of: ClipOf, files_of: FilesOf
) -> None:
    advanced: list[int] = []
    target = tmp_path / "copy" / indexed.name
    report = copy_store(indexed, target, advance=advanced.append)
    assert files_of(target) == _travelling(files_of(indexed))
    _assert_whole(target, KEYS, clip_of)
    in_shards = [len(d) for p, d in files_of(target).items() if p.startswith("shards/")]
    assert (report.store, report.num_shards, report.num_clips) == (str(target), 2, 5)
    assert (report.num_sent, report.num_present) == (len(in_shards), 0)
    assert report.num_bytes_sent == sum(advanced) == sum(in_shards)


def test_a_copy_brings_its_index_though_the_source_had_none(
    tmp_path: Path, store: Path, files_of: FilesOf
) -> None:
    target = tmp_path / "copy" / store.name
    copy_store(store, target)
    assert not (store / "index.npz").exists()
    assert files_of(target).keys() - files_of(store).keys() == {"index.npz"}


def test_a_copy_behind_a_web_server_is_read_and_copied_back(
    tmp_path: Path, indexed: Path, served: tuple[Path, str], clip_of: ClipOf, files_of: FilesOf
) -> None:
    folder, url = served
    copy_store(indexed, folder / indexed.name)
    _assert_whole(f"{url}/{indexed.name}", KEYS, clip_of)
    back = tmp_path / "back" / indexed.name
    copy_store(f"{url}/{indexed.name}", back)
    assert files_of(back) == _travelling(files_of(indexed))


def test_a_copy_on_s3_is_read_and_copied_back(
    tmp_path: Path, indexed: Path, bucket: str, clip_of: ClipOf, files_of: FilesOf
) -> None:
    url = f"{bucket}/{indexed.name}"
    first = copy_store(indexed, url)
    assert _store_on_s3(indexed) == _travelling(files_of(indexed))
    _assert_whole(url, KEYS, clip_of)
    back = tmp_path / "back" / indexed.name
    copy_store(url, back)
    assert files_of(back) == _travelling(files_of(indexed))
    again = copy_store(indexed, url)
    assert (again.num_sent, again.num_present) == (0, first.num_sent)


@pytest.mark.parametrize("medium", ["folder", "s3"])
def test_a_second_run_sends_what_is_missing_or_of_another_size(
    tmp_path: Path,
    indexed: Path,
    medium: str,
    files_of: FilesOf,
    clip_of: ClipOf,
    request: pytest.FixtureRequest,
) -> None:
    lost, short = "features/c.0.0.0.0.0", "mask/c.2.0.0"
    if medium == "folder":
        target: Path | str = tmp_path / "copy" / indexed.name
        copy_store(indexed, target)
        (Path(target) / "shards" / "00001" / lost).unlink()
        (Path(target) / "shards" / "00000" / short).write_bytes(b"short")
    else:
        import boto3

        target = f"{request.getfixturevalue('bucket')}/{indexed.name}"
        copy_store(indexed, target)
        client, prefix = boto3.client("s3"), f"cache/{indexed.name}/shards"
        client.delete_object(Bucket="clips", Key=f"{prefix}/00001/{lost}")
        client.put_object(Bucket="clips", Key=f"{prefix}/00000/{short}", Body=b"short")
    assert copy_store(indexed, target).num_sent == 2
    _assert_whole(target, KEYS, clip_of)
    found = files_of(Path(target)) if medium == "folder" else _store_on_s3(indexed)
    assert found == _travelling(files_of(indexed))


@pytest.mark.parametrize("medium", ["folder", "s3"])
def test_a_copy_follows_its_source_as_clips_come_and_go(
    tmp_path: Path,
    indexed: Path,
    medium: str,
    settings: StoreSettings,
    write_shard: Callable[..., None],
    clip_of: ClipOf,
    files_of: FilesOf,
    request: pytest.FixtureRequest,
) -> None:
    root = tmp_path / "copy" if medium == "folder" else request.getfixturevalue("bucket")
    target = root / indexed.name if isinstance(root, Path) else f"{root}/{indexed.name}"
    copy_store(indexed, target)
    drop_clips(indexed, ["a1"], detail="blurred")
    write_shard(StoreWriter.open(indexed.parent, settings, provenance={}), "00002", ["c0"])
    report = copy_store(indexed, target)
    assert (report.num_shards, report.num_clips) == (3, 5)
    _assert_whole(target, ["a0", "a2", "b0", "b1", "c0"], clip_of)
    drop_clips(indexed, ["a0", "b0"], detail="blurred")
    assert copy_store(indexed, target).num_sent == 0
    _assert_whole(target, ["a2", "b1", "c0"], clip_of)
    found = files_of(Path(target)) if medium == "folder" else _store_on_s3(indexed)
    assert found == _travelling(files_of(indexed))
    clips = [path for path in found if path.startswith("shards/00000/features/c.")]
    assert clips == ["shards/00000/features/c.2.0.0.0.0"]


def test_a_target_that_holds_something_else_is_refused(
    tmp_path: Path,
    indexed: Path,
    settings: StoreSettings,
    write_shard: Callable[..., None],
    files_of: FilesOf,
) -> None:
    def store_of(name: str, shards: dict[str, list[str]], made_with: StoreSettings) -> Path:
        writer = StoreWriter.open(tmp_path / name, made_with, provenance={})
        for shard, keys in shards.items():
            write_shard(writer, shard, keys)
        return writer.path

    more = store_of("more", {"00002": ["c0"]}, settings)
    other = store_of("other", {"00000": ["a0", "x1", "a2"]}, settings)
    dropped = store_of("dropped", {"00000": ["a0", "a1", "a2", "x3"]}, settings)
    drop_clips(dropped, ["x3"], detail="")  # newer than what it is compared with, as it were
    for target, named in ((more, "'00002'"), (other, "'00000'"), (dropped, "'00000'")):
        before = files_of(target)
        with pytest.raises(Refused, match=f"{named} that .* does not hold") as refused:
            copy_store(indexed, target)
        assert refused.value.remedy == "merge"
        assert files_of(target) == before
    slower = store_of("slower", {}, replace(settings, values={**settings.values, "fps": 4.0}))
    with pytest.raises(SettingsMismatch, match=r"differs in values\.fps;"):
        copy_store(indexed, slower)


def test_targets_that_make_no_sense(tmp_path: Path, indexed: Path) -> None:
    with pytest.raises(ValueError, match=f"must be {indexed.name}"):
        copy_store(indexed, tmp_path / "copy")
    with pytest.raises(ValueError, match="takes no files"):
        copy_store(indexed, f"http://127.0.0.1:9/{indexed.name}")
    with pytest.raises(ValueError, match="cannot be copied to itself"):
        copy_store(indexed, indexed)
    with pytest.raises(StoreNotFound):
        copy_store(tmp_path / "nothing", tmp_path / "copy" / indexed.name)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "metadata", "record"])
def test_a_damaged_source_makes_no_copy(
    tmp_path: Path, indexed: Path, damage: str, clip_of: ClipOf
) -> None:
    group = indexed / "shards" / "00001"
    file = {
        "metadata": group / "features" / "zarr.json",
        "record": indexed / "commits" / "00001.json",
    }.get(damage, group / "features/c.1.0.0.0.0")
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    target = tmp_path / "copy" / indexed.name
    with pytest.raises(CacheError, match="00001") as caught:
        copy_store(indexed, target)
    assert damage == "record" or isinstance(caught.value, CorruptClip)
    assert caught.value.remedy == "repair"
    with pytest.raises(StoreNotFound):
        StoreReader(target)


def test_a_server_that_is_down_is_not_a_damaged_store(
    tmp_path: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(StoreUnreachable):
        copy_store(f"http://127.0.0.1:9/{indexed.name}", tmp_path / indexed.name)


def test_files_sent_for_another_shard_are_not_taken_for_this_ones(
    tmp_path: Path, settings: StoreSettings, clip_of: ClipOf
) -> None:
    """Of the same name and size, from a copy that was killed before the shard was made anew."""

    def source(name: str, negative: bool) -> Path:
        writer = StoreWriter.open(tmp_path / name, settings, provenance={})
        with writer.shard("00000", source="00000.tar") as shard:
            for key in ("a0", "a1"):
                arrays = clip_of(key)
                shard.add(
                    key,
                    arrays if not negative else arrays | {"features": -arrays["features"]},
                    fingerprint=fingerprint_of(key),
                )
            shard.commit()
        return writer.path

    old, new = source("old", negative=True), source("new", negative=False)
    target = tmp_path / "copy" / old.name
    _, operations = run_and_kill(lambda: copy_store(old, tmp_path / "whole" / old.name), 0)
    run_and_kill(lambda: copy_store(old, target), operations // 2)
    assert (target / "shards" / "00000").exists()
    assert not (target / "commits" / "00000.json").exists()
    copy_store(new, target)
    _assert_whole(target, ["a0", "a1"], clip_of)


@pytest.mark.parametrize("part", range(10))
def test_a_killed_copy_is_finished_by_the_next_one(
    part: int, tmp_path: Path, indexed: Path, clip_of: ClipOf, files_of: FilesOf
) -> None:
    target = tmp_path / "copy" / indexed.name
    chance = random.Random(part)
    code, operations = run_and_kill(lambda: copy_store(indexed, tmp_path / "w" / indexed.name), 0)
    assert code == 0
    kill_at = [1 + (part * operations + chance.randrange(operations)) // 10]
    kill_at += [chance.randrange(1, operations)] * (part % 2)  # and once more while it recovers
    for number in kill_at:
        run_and_kill(lambda: copy_store(indexed, target), number)
        if (target / "store.json").exists():
            _assert_whole(target, KEYS, clip_of)
        else:
            with pytest.raises(StoreNotFound):
                StoreReader(target)
    sent = {path: path.stat().st_ino for path in target.rglob("c.*")}
    copy_store(indexed, target)
    assert sent.items() <= {path: path.stat().st_ino for path in sent}.items()  # none sent twice
    assert files_of(target) == _travelling(files_of(indexed))
    assert not (target / ".staging" / ".copy").exists()


@pytest.mark.parametrize("part", range(5))
def test_a_killed_update_never_loses_a_clip_that_both_have(
    part: int, tmp_path: Path, indexed: Path, clip_of: ClipOf, files_of: FilesOf
) -> None:
    target = tmp_path / "copy" / indexed.name
    copy_store(indexed, target)
    drop_clips(indexed, ["a0", "b1"], detail="blurred")
    whole = shutil.copytree(target, tmp_path / "whole" / indexed.name)
    code, operations = run_and_kill(lambda: copy_store(indexed, whole), 0)
    assert code == 0
    chance = random.Random(part)
    run_and_kill(
        lambda: copy_store(indexed, target),
        1 + (part * operations + chance.randrange(operations)) // 5,
    )
    keys = list(StoreReader(target).keys)
    assert {"a1", "a2", "b0"} <= set(keys)
    _assert_whole(target, keys, clip_of)
    copy_store(indexed, target)
    assert files_of(target) == _travelling(files_of(indexed))


_KILLED_PUT = """
import os, signal, sys
from cache_schema.maintenance import copy, copy_target

put, left = copy_target.UrlTarget.put, int(sys.argv[3])

def counted(self, path, data):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, path, data)

copy_target.UrlTarget.put = counted
copy.copy_store(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("part", range(3))
def test_a_killed_copy_to_s3_is_finished_by_the_next_one(
    part: int, indexed: Path, bucket: str, clip_of: ClipOf, files_of: FilesOf
) -> None:
    url = f"{bucket}/{indexed.name}"
    puts = len(_travelling(files_of(indexed)))
    kill_at = 1 + (part * puts + random.Random(part).randrange(puts)) // 3
    arguments = [sys.executable, "-c", _KILLED_PUT, str(indexed), url, str(kill_at)]
    killed = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -9
    with pytest.raises(StoreNotFound):
        StoreReader(url)
    report = copy_store(indexed, url)
    assert report.num_present >= kill_at - 8  # what was under way may be sent again
    assert _store_on_s3(indexed) == _travelling(files_of(indexed))
    _assert_whole(url, KEYS, clip_of)
