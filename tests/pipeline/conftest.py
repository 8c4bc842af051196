import pytest


@pytest.fixture
def minimal(tmp_path):
    """A configuration file with nothing but what has no default."""
    path = tmp_path / "minimal.yaml"
    path.write_text("name: minimal\ndata: {path: clips}\nmodel: {path: base}\n")
    return str(path)
