"""A small store for the tests: two arrays, clips whose values follow from their keys."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from tests.fingerprints import fingerprint_of

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def settings() -> StoreSettings:
    return StoreSettings(
        kind="teacher",
        arrays={
            "features": ArraySpec(
                dtype="float16", shape=(3, 2, 3, 4), dimension_names=("t", "h", "w", "c")
            ),
            "mask": ArraySpec(dtype="uint8", shape=(2, 3), dimension_names=("h", "w")),
        },
        values={"checkpoint": "ab" * 32, "fps": 8.0, "grid": [2, 3], "prompt": {"kind": "mask"}},
    )


@pytest.fixture(scope="session")
def clip_of() -> Callable[[str], Arrays]:
    """Values that follow from the key alone, whichever process asks."""

    def make(key: str) -> Arrays:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        random = np.random.default_rng(seed)
        return {
            "features": random.normal(size=(3, 2, 3, 4)).astype("float16"),
            "mask": random.integers(0, 2, size=(2, 3), dtype="uint8"),
        }

    return make


@pytest.fixture(scope="session")
def write_shard(clip_of: Callable[[str], Arrays]) -> Callable[..., None]:
    """Write and commit one shard, as stage one does: what is staged already is not done again."""

    def write(writer: StoreWriter, name: str, keys: Sequence[str], *, skip: str = "") -> None:
        if writer.is_committed(name):
            return
        with writer.shard(name, source=f"{name}.tar") as shard:
            for key in keys:
                if not shard.has(key):
                    shard.add(
                        key,
                        clip_of(key),
                        {"source_fps": 29.97, "name": key},
                        fingerprint=fingerprint_of(key),
                    )
            if skip and not shard.has(skip):
                shard.skip(
                    skip, "too_short", "12 frames, 49 needed", fingerprint=fingerprint_of(skip)
                )
            shard.commit()

    return write


@pytest.fixture(scope="session")
def _finished_store(
    tmp_path_factory: pytest.TempPathFactory,
    settings: StoreSettings,
    write_shard: Callable[..., None],
) -> Path:
    root = tmp_path_factory.mktemp("finished")
    writer = StoreWriter.open(root, settings, provenance={"version": "1.2.3"})
    write_shard(writer, "00000", ["a0", "a1", "a2"], skip="a3")
    write_shard(writer, "00001", ["b0", "b1"])
    return writer.path


@pytest.fixture
def store(tmp_path: Path, _finished_store: Path) -> Path:
    """A copy, to be damaged, of two finished shards: a0, a1, a2 and one skipped; b0, b1."""
    return shutil.copytree(_finished_store, tmp_path / "cache" / _finished_store.name)


@pytest.fixture
def indexed(store: Path, settings: StoreSettings) -> Path:
    """The store with its index."""
    StoreWriter.open(store.parent, settings, provenance={}).write_index()
    return store


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read
