import pytest

from tests.pipeline.cache_stores import write_store


@pytest.fixture
def minimal(tmp_path):
    """A configuration file with nothing but what has no default."""
    path = tmp_path / "minimal.yaml"
    path.write_text("name: minimal\ndata: {path: clips}\nmodel: {path: base}\n")
    return str(path)


@pytest.fixture
def cache(tmp_path):
    """Two shards, three clips, of two kinds."""
    folder = tmp_path / "cache"
    shards = {"00000": ["walk/0", "walk/1"], "00001": ["run/0"]}
    write_store(folder, "teacher", shards, skipped=["walk/9"])
    write_store(folder, "text", shards)
    return folder
