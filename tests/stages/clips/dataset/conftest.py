"""Folders with datasets, and the captions read from them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.clips import BadRecord, ClipsConfig


@pytest.fixture
def fill(tmp_path, video):
    """Make files under a folder: text as given, videos and pictures by their suffix."""

    def make(files: dict[str, str | bytes], folder: str = "data") -> Path:
        root = tmp_path / folder
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".mp4", ".mov") and not content:
                content = video
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return make


@pytest.fixture
def captions(tools) -> Callable[[ClipsConfig], dict[str, str | None]]:
    """Captions by key of a dataset without bad records."""

    def read(config: ClipsConfig) -> dict[str, str | None]:
        records = tools.by_key(tools.read_all(config))
        assert not [one for one in records.values() if isinstance(one, BadRecord)], records
        return {key: record.caption for key, record in records.items()}

    return read
