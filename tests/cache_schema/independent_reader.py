"""A reader of stores written from cache_schema/README.md alone, for the tests.

It shares nothing with the package: no cache_schema, no zarr, a CRC-32C of its own.
"""

import hashlib
import itertools
import json
import math
import struct
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np

CHUNK_BYTES = 2**20


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def unseal(data: bytes) -> dict[str, Any]:
    """A sealed JSON file."""
    blank = data[:14] + b"00000000" + data[22:]
    assert data[14:22] == f"{crc32c(blank):08x}".encode(), "the record fails its checksum"
    record = json.loads(data)
    assert list(record)[:2] == ["crc32c", "schema_version"]
    assert record["schema_version"] == 4
    return record


def settings_hash(store: dict[str, Any]) -> str:
    arrays = {
        name: {key: value for key, value in array.items() if key != "compression"}
        for name, array in store["arrays"].items()
    }
    hashed = {"arrays": arrays, "kind": store["kind"], "values": store["values"]}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def chunk_entries(array: dict[str, Any]) -> int:
    """Entries of the leading axis in an inner chunk."""
    length, *rest = array["shape"]
    entry_bytes = math.prod(rest) * np.dtype(array["dtype"]).itemsize
    fitting = [
        count
        for count in range(1, length + 1)
        if length % count == 0 and count * entry_bytes <= CHUNK_BYTES
    ]
    return max(fitting, default=1)


def decode(data: bytes, array: dict[str, Any], table_crc32c: str) -> np.ndarray:
    """One clip from its file."""
    number = array["shape"][0] // chunk_entries(array)
    table = data[-20 * number - 4 : -4]
    assert f"{crc32c(table):08x}" == table_crc32c, "the table is not the clip's"
    checksums, pairs = table[: 4 * number], table[4 * number :]
    assert struct.unpack("<I", data[-4:]) == (crc32c(pairs),), "the pairs fail their checksum"
    pieces = []
    for place, (expected,) in zip(
        struct.iter_unpack("<QQ", pairs), struct.iter_unpack("<I", checksums), strict=True
    ):
        offset, size = place
        chunk, crc = data[offset : offset + size - 4], data[offset + size - 4 : offset + size]
        assert struct.unpack("<I", crc) == (crc32c(chunk),), "a chunk fails its checksum"
        assert crc32c(chunk) == expected, "a chunk is not the clip's"
        if array["compression"] == "blosc-zstd-shuffle":
            chunk = numcodecs.blosc.decompress(chunk)
        pieces.append(chunk)
    dtype = np.dtype(array["dtype"]).newbyteorder("<")
    return np.frombuffer(b"".join(pieces), dtype).reshape(array["shape"])


class IndependentReader:
    """All of a local store, by its commit records."""

    def __init__(self, store: Path) -> None:
        self.path = store
        self.store = unseal((store / "store.json").read_bytes())
        assert settings_hash(self.store) == self.store["settings_hash"]
        self.records = {}
        for path in sorted((store / "commits").glob("*.json")):
            record = unseal(path.read_bytes())
            assert record["settings_hash"] == self.store["settings_hash"]
            assert record["shard"] == path.stem
            self.records[path.stem] = record
        self.clips = {
            clip["key"]: (shard, clip)
            for shard, record in self.records.items()
            for clip in record["clips"]
        }
        assert len(self.clips) == sum(len(record["clips"]) for record in self.records.values())

    def group(self, shard: str) -> Path:
        group = self.records[shard]["group"]
        assert 0 <= group <= self.records[shard]["generation"]
        return self.path / "shards" / (f"{shard}~{group}" if group else shard)

    def read(self, key: str) -> dict[str, np.ndarray]:
        shard, clip = self.clips[key]
        assert key and len(key.encode()) <= 1024
        assert not any(unicodedata.category(character) == "Cc" for character in key)
        found = {}
        for name, array in self.store["arrays"].items():
            stored = clip["arrays"][name]
            zeros = ["0"] * len(array["shape"])
            assert stored["path"] == f"{name}/" + ".".join(["c", str(clip["index"]), *zeros])
            data = (self.group(shard) / stored["path"]).read_bytes()
            assert len(data) == stored["bytes"], "the file is of another size"
            found[name] = decode(data, array, stored["table_crc32c"])
            assert stored["crc32c"] == f"{crc32c(found[name].tobytes()):08x}"
        return found

    def check_metadata(self) -> None:
        """Every group holds the files of its record and no other."""
        for shard, record in self.records.items():
            group = self.group(shard)
            for path, file in record["files"].items():
                data = (group / path).read_bytes()
                assert (len(data), f"{crc32c(data):08x}") == (file["bytes"], file["crc32c"])
            indices = [clip["index"] for clip in record["clips"]]
            assert indices == sorted(set(indices))
            listed = set(record["files"])
            for clip in record["clips"]:
                listed |= {stored["path"] for stored in clip["arrays"].values()}
            found = {p.relative_to(group).as_posix() for p in group.rglob("*") if p.is_file()}
            assert found == listed


def _texts(columns: dict[str, np.ndarray], name: str) -> list[str]:
    text = columns[f"{name}.text"].tobytes()
    starts = [0, *columns[f"{name}.ends"].tolist()]
    return [text[a:b].decode("utf-8") for a, b in itertools.pairwise(starts)]


def read_index(path: Path) -> dict[str, np.ndarray]:
    """The columns of `index.npz`."""
    columns = {}
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        for name in file.namelist():
            assert file.getinfo(name).compress_type == zipfile.ZIP_STORED
            with file.open(name) as member:
                columns[name.removesuffix(".npy")] = np.lib.format.read_array(
                    member, allow_pickle=False
                )
    return columns


def clips_of_index(
    columns: dict[str, np.ndarray], arrays: dict[str, Any]
) -> dict[str, tuple[str, int, str, dict[str, tuple[int, str, str]]]]:
    """By key: the group's folder, the clip's index in it, fingerprint, size and checksums of each
    array."""
    assert columns["schema_version"].tolist() == [4]
    names, keys = _texts(columns, "shards.name"), _texts(columns, "keys")
    assert (names, keys) == (sorted(names), sorted(keys))
    clips = {}
    for row, key in enumerate(keys):
        shard = int(columns["clips.shard"][row])
        group = int(columns["shards.group"][shard])
        folder = f"{names[shard]}~{group}" if group else names[shard]
        stored = {
            name: (
                int(columns[f"arrays.{name}.bytes"][row]),
                f"{int(columns[f'arrays.{name}.crc32c'][row]):08x}",
                f"{int(columns[f'arrays.{name}.table_crc32c'][row]):08x}",
            )
            for name in arrays
        }
        fingerprint = columns["clips.fingerprint"][row].decode("ascii")
        clips[key] = (folder, int(columns["clips.index"][row]), fingerprint, stored)
    return clips


def shards_of_index(columns: dict[str, np.ndarray]) -> dict[str, tuple[str, int, str]]:
    """By name: source, generation, and the checksum the commit record opens with."""
    facts = zip(
        _texts(columns, "shards.source"),
        columns["shards.generation"].tolist(),
        (f"{crc:08x}" for crc in columns["shards.crc32c"].tolist()),
        strict=True,
    )
    return dict(zip(_texts(columns, "shards.name"), facts, strict=True))


def skipped_of_index(columns: dict[str, np.ndarray]) -> list[tuple[str, str, str, str, str]]:
    """Shard, key, reason, detail and fingerprint of every skipped clip."""
    names = _texts(columns, "shards.name")
    shards = [names[row] for row in columns["skipped.shard"].tolist()]
    words = (_texts(columns, f"skipped.{name}") for name in ("key", "reason", "detail"))
    fingerprints = (found.decode("ascii") for found in columns["skipped.fingerprint"].tolist())
    return list(zip(shards, *words, fingerprints, strict=True))
