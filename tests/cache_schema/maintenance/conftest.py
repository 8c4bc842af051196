"""A store with things that do not travel, and an S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_schema import StoreSettings, StoreWriter
from tests.cache_schema.maintenance.copies import objects_on_s3


@pytest.fixture
def leaving_home(store: Path, settings: StoreSettings) -> Path:
    """The store with its index, and things that do not travel."""
    writer = StoreWriter.open(store.parent, settings, provenance={})
    writer.write_index()
    with writer.shard("00007", source="00007.tar"):
        pass
    (store / "quarantine" / "1").mkdir(parents=True)
    (store / "quarantine" / "1" / "00009.json").write_text("{}", "utf-8")
    return store


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
    for path in objects_on_s3():
        client.delete_object(Bucket="clips", Key=path)
    client.delete_bucket(Bucket="clips")
