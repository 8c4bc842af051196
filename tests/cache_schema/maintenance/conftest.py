"""Stores with files that copies leave out, or with contradictory compression; an S3 bucket."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_schema import StoreSettings, StoreWriter
from tests.cache_schema.made_stores import SETTINGS, write_shard
from tests.cache_schema.maintenance.copies import objects_on_s3


@pytest.fixture
def leaving_home(store: Path) -> Path:
    """The store with its index, and things that do not travel."""
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    writer.write_index()
    with writer.shard("00007", source="00007.tar"):
        pass
    (store / "quarantine" / "1").mkdir(parents=True)
    (store / "quarantine" / "1" / "00009.json").write_text("{}", "utf-8")
    return store


@pytest.fixture
def packed_otherwise(tmp_path: Path) -> Path:
    """A store whose shard is compressed, though its store.json says that it is not."""
    settings = json.dumps(SETTINGS.as_dict()).replace('"none"', '"blosc-zstd-shuffle"')
    packed = StoreSettings.from_dict(json.loads(settings))
    writer = StoreWriter.open(tmp_path, packed, provenance={})
    write_shard(writer, "00000", ["a0"])
    unpacked = StoreWriter.open(tmp_path / "other", SETTINGS, provenance={})
    shutil.copyfile(unpacked.path / "store.json", writer.path / "store.json")
    return writer.path


@pytest.fixture
def bucket(s3_server: str) -> Iterator[str]:
    """The URL of an empty bucket of an S3 server on this machine."""
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("s3")
    client.create_bucket(Bucket="clips")
    yield "s3://clips/cache"
    for path in objects_on_s3():
        client.delete_object(Bucket="clips", Key=path)
    client.delete_bucket(Bucket="clips")
