"""A small store whose clips follow from their keys, and what must hold of it after any fault.

What a store ought to hold is read here from its commit records as plain JSON, so that the reader
is compared with something that does not share its code.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from cache_schema import ArraySpec, StoreNotFound, StoreReader, StoreSettings, StoreWriter
from tests.fingerprints import fingerprint_of

SETTINGS = StoreSettings(
    kind="teacher",
    arrays={
        "features": ArraySpec(
            dtype="float16", shape=(3, 2, 3, 4), dimension_names=("t", "h", "w", "c")
        ),
        "flow": ArraySpec(
            dtype="float16",
            shape=(2, 4, 3),
            dimension_names=("t", "h", "k"),
            compression="blosc-zstd-shuffle",
        ),
        "mask": ArraySpec(dtype="uint8", shape=(2, 3), dimension_names=("h", "w")),
    },
    values={"checkpoint": "ab" * 32, "fps": 8.0, "grid": [2, 3], "prompt": {"kind": "mask"}},
)
SHARDS = {"00000": ("a0", "a1", "a2"), "00001": ("b0", "b1")}
SKIPPED = {"00000": ("a3",), "00001": ()}


def clip_of(key: str) -> dict[str, np.ndarray]:
    """Values that follow from the key alone, whichever process asks."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    random = np.random.default_rng(seed)
    return {
        "features": random.normal(size=(3, 2, 3, 4)).astype("float16"),
        "flow": random.normal(size=(2, 4, 3)).astype("float16"),
        "mask": random.integers(0, 2, size=(2, 3), dtype="uint8"),
    }


def write_all(root: Path) -> Path:
    """What stage one does: the shards that are not finished, from where the last writer stopped."""
    writer = StoreWriter.open(root, SETTINGS, provenance={"version": "1.2.3"})
    for shard in SHARDS:
        if not writer.is_committed(shard):
            write_shard(writer, shard)
    writer.write_index()
    return writer.path


def write_shard(writer: StoreWriter, name: str) -> None:
    """One shard that is not finished."""
    with writer.shard(name, source=f"{name}.tar") as shard:
        for key in SHARDS[name]:
            if not shard.has(key):
                shard.add(key, clip_of(key), {"source_fps": 29.97}, fingerprint=fingerprint_of(key))
        for key in SKIPPED[name]:
            if not shard.has(key):
                shard.skip(
                    key, "too_short", "12 frames, 49 needed", fingerprint=fingerprint_of(key)
                )
        shard.commit()


def write_again(store: Path) -> None:
    """What --retry-failed does: damaged clips once more, each shard's in a retry of its own."""
    left_out = [clip for clip in StoreReader(store).skipped if clip.reason == "damaged"]
    writer = StoreWriter.open(store.parent, SETTINGS, provenance={})
    for name, keys in SHARDS.items():
        again = [clip.key for clip in left_out if clip.key in keys]
        if again:
            number = 1 + sum(name.startswith(f"{name}-retry") for name in committed(store))
            with writer.shard(f"{name}-retry{number}", source=f"{name}.tar, retry") as shard:
                for key in again:
                    shard.add(
                        key, clip_of(key), {"source_fps": 29.97}, fingerprint=fingerprint_of(key)
                    )
                shard.commit()
    writer.write_index()


def committed(store: Path) -> dict[str, dict]:
    """The commit records as they lie on disk, by shard."""
    return {path.stem: json.loads(path.read_bytes()) for path in store.glob("commits/*.json")}


def finished_files(store: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file of the finished shards."""
    files = list(store.glob("commits/*.json"))
    for shard, record in committed(store).items():
        number = record["group"]
        group = store / "shards" / (f"{shard}~{number}" if number else shard)
        files += [path for path in group.rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def assert_reads_what_is_committed(store: Path) -> None:
    """A reader sees whole shards only, exactly those on record, bit for bit."""
    records = committed(store)
    for shard, record in records.items():
        assert tuple(clip["key"] for clip in record["clips"]) == SHARDS[shard]
    try:
        reader = StoreReader(store)
    except StoreNotFound:
        assert not records
        return
    assert sorted(reader.keys) == sorted(key for shard in records for key in SHARDS[shard])
    for key in reader.keys:
        assert_equals_the_clip(reader, key)


def assert_equals_the_clip(reader: StoreReader, key: str) -> None:
    """All arrays, type, shape and every bit."""
    expected = clip_of(key)
    found = reader.read(key)
    assert sorted(found) == sorted(expected)
    for name, values in found.items():
        assert values.dtype == expected[name].dtype
        assert values.shape == expected[name].shape
        assert values.tobytes() == expected[name].tobytes()


def damage_in_every_way(store: Path) -> Path:
    """A lost clip, a changed one, changed metadata, leftovers; a changed index."""
    group = store / "shards" / "00000"
    (group / "features/c.0.0.0.0.0").unlink()
    _flip(group / "flow/c.2.0.0.0", 9)
    (group / "notes.txt").write_text("hello")
    _flip(store / "shards" / "00001" / "mask" / "zarr.json", 30)
    (store / "shards" / "00001~7" / "mask").mkdir(parents=True)
    (store / "commits" / "00001.json.orig").write_text("{}")
    _flip(store / "index.npz", 700)
    return store


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def without_quarantine(files: dict[str, bytes]) -> dict[str, bytes]:
    """A store's files but those that were taken out of it."""
    return {path: data for path, data in files.items() if not path.startswith("quarantine/")}
