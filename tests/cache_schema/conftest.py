"""A finished store of two shards, copied for each test to damage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_schema import StoreWriter
from tests.cache_schema.made_stores import SETTINGS, write_shard


@pytest.fixture(scope="session")
def _finished_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    writer = StoreWriter.open(root, SETTINGS, provenance={"version": "1.2.3"})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    write_shard(writer, "00001", ["b0", "b1"])
    return writer.path


@pytest.fixture
def store(tmp_path: Path, _finished_store: Path) -> Path:
    """A copy, to be damaged, of two finished shards: a0, a1, a2 and one skipped; b0, b1."""
    return shutil.copytree(_finished_store, tmp_path / "cache" / _finished_store.name)


@pytest.fixture
def indexed(store: Path) -> Path:
    """The store with its index."""
    StoreWriter.open(store.parent, SETTINGS, provenance={}).write_index()
    return store


@pytest.fixture(scope="session")
def _s3_address() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_server(_s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 server on this machine, which clients find by their environment; its address."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": _s3_address,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return _s3_address
