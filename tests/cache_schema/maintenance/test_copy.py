"""Copies equal their source: in a folder, over HTTP, on S3, and after an interrupted copy."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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
from tests.cache_schema.made_stores import SETTINGS, assert_whole, clip_of, files_of, write_shard
from tests.cache_schema.maintenance.copies import damage_file, store_on_s3, travelling
from tests.cache_schema.servers import serving_plainly
from tests.fingerprints import fingerprint_of

KEYS = ["a0", "a1", "a2", "b0", "b1"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address that a plain web server shows it at."""
    folder = tmp_path / "served"
    folder.mkdir()
    with serving_plainly(folder) as url:
        yield folder, url


def test_a_copy_has_every_file_that_travels_and_no_other(
    tmp_path: Path, leaving_home: Path
) -> None:
    advanced: list[int] = []
    target = tmp_path / "copy" / leaving_home.name
    report = copy_store(leaving_home, target, advance=advanced.append)
    assert files_of(target) == travelling(files_of(leaving_home))
    assert_whole(target, KEYS)
    in_shards = [len(d) for p, d in files_of(target).items() if p.startswith("shards/")]
    assert (report.store, report.num_shards, report.num_clips) == (str(target), 2, 5)
    assert (report.num_sent, report.num_present) == (len(in_shards), 0)
    assert report.num_bytes_sent == sum(advanced) == sum(in_shards)


def test_a_copy_brings_its_index_though_the_source_had_none(tmp_path: Path, store: Path) -> None:
    target = tmp_path / "copy" / store.name
    copy_store(store, target)
    assert not (store / "index.npz").exists()
    assert files_of(target).keys() - files_of(store).keys() == {"index.npz"}


def test_a_copy_behind_a_web_server_is_read_and_copied_back(
    tmp_path: Path, leaving_home: Path, served: tuple[Path, str]
) -> None:
    folder, url = served
    copy_store(leaving_home, folder / leaving_home.name)
    assert_whole(f"{url}/{leaving_home.name}", KEYS)
    back = tmp_path / "back" / leaving_home.name
    copy_store(f"{url}/{leaving_home.name}", back)
    assert files_of(back) == travelling(files_of(leaving_home))


def test_a_copy_on_s3_is_read_and_copied_back(
    tmp_path: Path, leaving_home: Path, bucket: str
) -> None:
    url = f"{bucket}/{leaving_home.name}"
    first = copy_store(leaving_home, url)
    assert store_on_s3(leaving_home) == travelling(files_of(leaving_home))
    assert_whole(url, KEYS)
    back = tmp_path / "back" / leaving_home.name
    copy_store(url, back)
    assert files_of(back) == travelling(files_of(leaving_home))
    again = copy_store(leaving_home, url)
    assert (again.num_sent, again.num_present) == (0, first.num_sent)


@pytest.mark.parametrize("medium", ["folder", "s3"])
def test_a_second_run_sends_what_is_missing_or_of_another_size(
    tmp_path: Path, leaving_home: Path, medium: str, request: pytest.FixtureRequest
) -> None:
    lost, short = "features/c.0.0.0.0.0", "mask/c.2.0.0"
    if medium == "folder":
        target: Path | str = tmp_path / "copy" / leaving_home.name
        copy_store(leaving_home, target)
        (Path(target) / "shards" / "00001" / lost).unlink()
        (Path(target) / "shards" / "00000" / short).write_bytes(b"short")
    else:
        import boto3

        target = f"{request.getfixturevalue('bucket')}/{leaving_home.name}"
        copy_store(leaving_home, target)
        client, prefix = boto3.client("s3"), f"cache/{leaving_home.name}/shards"
        client.delete_object(Bucket="clips", Key=f"{prefix}/00001/{lost}")
        client.put_object(Bucket="clips", Key=f"{prefix}/00000/{short}", Body=b"short")
    assert copy_store(leaving_home, target).num_sent == 2
    assert_whole(target, KEYS)
    found = files_of(Path(target)) if medium == "folder" else store_on_s3(leaving_home)
    assert found == travelling(files_of(leaving_home))


@pytest.mark.parametrize("medium", ["folder", "s3"])
def test_a_copy_follows_its_source_as_clips_come_and_go(
    tmp_path: Path, leaving_home: Path, medium: str, request: pytest.FixtureRequest
) -> None:
    root = tmp_path / "copy" if medium == "folder" else request.getfixturevalue("bucket")
    target = root / leaving_home.name if isinstance(root, Path) else f"{root}/{leaving_home.name}"
    copy_store(leaving_home, target)
    drop_clips(leaving_home, ["a1"], detail="blurred")
    write_shard(StoreWriter.open(leaving_home.parent, SETTINGS, provenance={}), "00002", ["c0"])
    report = copy_store(leaving_home, target)
    assert (report.num_shards, report.num_clips) == (3, 5)
    assert_whole(target, ["a0", "a2", "b0", "b1", "c0"])
    drop_clips(leaving_home, ["a0", "b0"], detail="blurred")
    assert copy_store(leaving_home, target).num_sent == 0
    assert_whole(target, ["a2", "b1", "c0"])
    found = files_of(Path(target)) if medium == "folder" else store_on_s3(leaving_home)
    assert found == travelling(files_of(leaving_home))
    clips = [path for path in found if path.startswith("shards/00000/features/c.")]
    assert clips == ["shards/00000/features/c.2.0.0.0.0"]


def test_a_target_that_holds_something_else_is_refused(tmp_path: Path, leaving_home: Path) -> None:
    def store_of(name: str, shards: dict[str, list[str]], made_with: StoreSettings) -> Path:
        writer = StoreWriter.open(tmp_path / name, made_with, provenance={})
        for shard, keys in shards.items():
            write_shard(writer, shard, keys)
        return writer.path

    more = store_of("more", {"00002": ["c0"]}, SETTINGS)
    other = store_of("other", {"00000": ["a0", "x1", "a2"]}, SETTINGS)
    dropped = store_of("dropped", {"00000": ["a0", "a1", "a2", "x3"]}, SETTINGS)
    drop_clips(dropped, ["x3"], detail="")  # newer than what it is compared with, as it were
    for target, named in ((more, "'00002'"), (other, "'00000'"), (dropped, "'00000'")):
        before = files_of(target)
        with pytest.raises(Refused, match=f"{named} that .* does not hold") as refused:
            copy_store(leaving_home, target)
        assert refused.value.remedy == "merge"
        assert files_of(target) == before
    slower = store_of("slower", {}, replace(SETTINGS, values={**SETTINGS.values, "fps": 4.0}))
    with pytest.raises(SettingsMismatch, match=r"differs in values\.fps;"):
        copy_store(leaving_home, slower)


def test_targets_that_make_no_sense(tmp_path: Path, leaving_home: Path) -> None:
    with pytest.raises(ValueError, match=f"must be named {leaving_home.name}"):
        copy_store(leaving_home, tmp_path / "copy")
    with pytest.raises(ValueError, match="takes no files"):
        copy_store(leaving_home, f"http://127.0.0.1:9/{leaving_home.name}")
    with pytest.raises(ValueError, match="cannot be copied to itself"):
        copy_store(leaving_home, leaving_home)
    with pytest.raises(StoreNotFound):
        copy_store(tmp_path / "nothing", tmp_path / "copy" / leaving_home.name)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "metadata", "record"])
def test_a_damaged_source_makes_no_copy(tmp_path: Path, leaving_home: Path, damage: str) -> None:
    group = leaving_home / "shards" / "00001"
    file = {
        "metadata": group / "features" / "zarr.json",
        "record": leaving_home / "commits" / "00001.json",
    }.get(damage, group / "features/c.1.0.0.0.0")
    damage_file(file, damage)
    target = tmp_path / "copy" / leaving_home.name
    with pytest.raises(CacheError, match="00001") as caught:
        copy_store(leaving_home, target)
    assert damage == "record" or isinstance(caught.value, CorruptClip)
    assert caught.value.remedy == "repair"
    with pytest.raises(StoreNotFound):
        StoreReader(target)


def test_a_server_that_is_down_is_not_a_damaged_store(
    tmp_path: Path, leaving_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(StoreUnreachable):
        copy_store(f"http://127.0.0.1:9/{leaving_home.name}", tmp_path / leaving_home.name)


def test_files_sent_for_another_shard_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    """Of the same name and size, from a copy that was killed before the shard was made anew."""

    def source(name: str, negative: bool) -> Path:
        writer = StoreWriter.open(tmp_path / name, SETTINGS, provenance={})
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
    assert_whole(target, ["a0", "a1"])
