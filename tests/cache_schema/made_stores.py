"""Settings, clips, shards and files of a small store; clip values are a function of the key."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from tests.fingerprints import fingerprint_of

SETTINGS = StoreSettings(
    kind="teacher",
    arrays={
        "features": ArraySpec(
            dtype="float16", shape=(3, 2, 3, 4), dimension_names=("t", "h", "w", "c")
        ),
        "mask": ArraySpec(dtype="uint8", shape=(2, 3), dimension_names=("h", "w")),
    },
    values={"checkpoint": "ab" * 32, "fps": 8.0, "grid": [2, 3], "prompt": {"kind": "mask"}},
)


def clip_of(key: str) -> dict[str, np.ndarray]:
    """Values that follow from the key alone, whichever process asks."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    random = np.random.default_rng(seed)
    return {
        "features": random.normal(size=(3, 2, 3, 4)).astype("float16"),
        "mask": random.integers(0, 2, size=(2, 3), dtype="uint8"),
    }


def write_shard(writer: StoreWriter, name: str, keys: Sequence[str], *, skip: str = "") -> None:
    """Write and commit one shard, as stage one does: what is staged already is not done again."""
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
            shard.skip(skip, "too_short", "12 frames, 49 needed", fingerprint=fingerprint_of(skip))
        shard.commit()


def commit_twins(store: Path, *shards: str) -> None:
    """Commit the clip "twin" in each of two shards, in this order."""
    writers = [StoreWriter.open(store.parent, SETTINGS, provenance={}) for _ in shards]
    with ExitStack() as stack:  # neither is committed when the other looks
        for shard in [
            stack.enter_context(writer.shard(name, source=name))
            for writer, name in zip(writers, shards, strict=True)
        ]:
            attributes = {"source_fps": 29.97, "name": "twin"}
            shard.add("twin", clip_of("twin"), attributes, fingerprint=fingerprint_of("twin"))
            shard.commit()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_whole(store: Path | str, keys: Sequence[str]) -> None:
    """The store holds these clips and no other, with every value."""
    reader = StoreReader(store)
    assert list(reader.keys) == sorted(keys)
    for key in keys:
        for name, values in reader.read(key).items():
            np.testing.assert_array_equal(values, clip_of(key)[name])
