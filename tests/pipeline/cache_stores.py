"""Small real stores, and helpers that run the cache commands on them."""

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from pipeline.cli import app
from tests.fingerprints import fingerprint_of

SHAPES = {"teacher": (4, 2, 3, 5), "text": (3, 8)}
PROVENANCE = {"sam2videox": "9.8.7", "commit": "0123456789abcdef", "uncommitted_changes": True}


def settings_of(kind, precision="fp32"):
    shape = SHAPES[kind]
    spec = ArraySpec(dtype="float32", shape=shape, dimension_names=tuple("thwc"[: len(shape)]))
    return StoreSettings(kind=kind, arrays={"values": spec}, values={"precision": precision})


def value(kind, key):
    """What the store of that kind holds of a clip."""
    seed = [ord(character) for character in f"{kind} {key}"]
    return np.random.default_rng(seed).standard_normal(SHAPES[kind], np.float32)


def write_store(cache, kind, shards, *, skipped=(), precision="fp32"):
    writer = StoreWriter.open(cache, settings_of(kind, precision), provenance=PROVENANCE)
    for name, keys in shards.items():
        with writer.shard(name, source=f"{name}.tar") as shard:
            for key in keys:
                shard.add(key, {"values": value(kind, key)}, {}, fingerprint=fingerprint_of(key))
            for key in skipped if name == min(shards) else ():
                shard.skip(key, "too_short", "has 3 frames", fingerprint=fingerprint_of(key))
            shard.commit()
    writer.write_index()
    return writer.path


def holds(store, kind, keys):
    """Whether a store reads back exactly these clips."""
    reader = StoreReader(store)
    assert list(reader.keys) == sorted(keys)
    for key in keys:
        np.testing.assert_array_equal(reader.read(key)["values"], value(kind, key))
    return True


KEYS = ["walk/0", "walk/1", "run/0"]


def store(cache, kind):
    (found,) = cache.glob(f"{kind}-*")
    return found


def file_of(cache, kind, key):
    """Where the bytes of a clip lie."""
    reader = StoreReader(store(cache, kind))
    entry = reader.record(key)
    (folder,) = (reader.path / "shards").glob(f"{entry.shard}*")
    return folder / entry.arrays["values"].path


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 64
    path.write_bytes(data)


def invoke(*words):
    return CliRunner().invoke(app, ["cache", *map(str, words)])


def answer(*words, exit_code=0):
    """The stores that a command tells of, by kind."""
    result = invoke(*words, "--json")
    assert result.exit_code == exit_code, result.output
    told = json.loads(result.stdout)["stores"]
    return {Path(one["store"]).name.rpartition("-")[0]: one for one in told}
