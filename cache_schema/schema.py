"""What decides a store's values: its kind, arrays and settings, and the hash that names it.

Built by stage one, compared by every writer, read by every reader.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self, get_args

import numpy as np

from cache_schema.checksummed_json import JSON, plain_mapping
from cache_schema.names import check_identifier

DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)
"""Data types a store can hold; all of them exist in Zarr's own specification."""

CLIP_DIMENSION = "clip"

Compression = Literal["none", "blosc-zstd-shuffle"]
"""How inner chunks are packed; the second is Zstandard level 1 behind Blosc's byte shuffle."""

MAX_SHARED_CHUNK_BYTES = 2**20

MAX_ARRAY_BYTES = 2**33
"""Largest array of a clip. Whoever reads a store makes room for what its `store.json` says."""

MAX_CHUNKS = 2**16
"""Most inner chunks of an array of a clip."""

_MAX_ARRAYS = 64
_MAX_AXES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of every clip: its type, its shape without the clip axis, the axes' names.

    The leading axis (frames, as a rule) is the one that is stored in pieces.
    """

    dtype: str
    """Name of the data type, such as `float16`; see `DTYPES`."""
    shape: tuple[int, ...]
    """Sizes for one clip, for example (t, h, w, c)."""
    dimension_names: tuple[str, ...]
    """One name per axis of `shape`."""
    compression: Compression = "none"
    """How the array lies on disk. It changes no value, so the settings' hash leaves it out."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.compression not in get_args(Compression):
            raise ValueError(
                f"compression is {self.compression!r}; it must be one of "
                f"{', '.join(get_args(Compression))}"
            )
        shape = tuple(self.shape)
        if not shape or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"shape is {self.shape!r}; it must be one or more integers >= 1")
        names = tuple(check_identifier(name, "dimension name") for name in self.dimension_names)
        if len(names) != len(shape) or len({*names, CLIP_DIMENSION}) != len(names) + 1:
            raise ValueError(
                f"dimension_names is {names!r}; it must be {len(shape)} different names, one per "
                f"axis of shape {shape}, none of them {CLIP_DIMENSION!r}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dimension_names", names)
        if len(shape) > _MAX_AXES or self.num_bytes > MAX_ARRAY_BYTES:
            raise ValueError(
                f"shape is {shape} of {self.dtype}; at most {_MAX_AXES} axes and "
                f"{MAX_ARRAY_BYTES / 2**30:g} GiB a clip can be stored"
            )
        if self.num_chunks > MAX_CHUNKS:
            raise ValueError(
                f"shape is {shape} of {self.dtype}, which takes {self.num_chunks} inner chunks; at "
                f"most {MAX_CHUNKS} can be stored: make the leading axis shorter"
            )

    @property
    def chunk_length(self) -> int:
        """Entries of the leading axis in one inner chunk.

        One frame of a teacher's features, so that some frames can be read without the others.
        Smaller entries go together, as many as divide the axis evenly and stay within
        `MAX_SHARED_CHUNK_BYTES`: every inner chunk costs time whatever its size.
        """
        return _chunk_length(self.shape[0], self.num_bytes // self.shape[0], MAX_SHARED_CHUNK_BYTES)

    @property
    def num_chunks(self) -> int:
        """Inner chunks of one clip."""
        return self.shape[0] // self.chunk_length

    @property
    def num_bytes(self) -> int:
        """Of one clip's values, not compressed."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type in this machine's byte order."""
        return np.dtype(self.dtype)

    def as_dict(self) -> dict[str, JSON]:
        """The specification as it is written in `store.json`."""
        return {**self.hashed_dict(), "compression": self.compression}

    def hashed_dict(self) -> dict[str, JSON]:
        """What of it decides values, as the settings' hash takes it."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "dimension_names": list(self.dimension_names),
        }


@lru_cache(maxsize=64)
def _chunk_length(length: int, entry_bytes: int, chunk_bytes: int) -> int:
    most = max(1, min(length, chunk_bytes // entry_bytes))
    return next(count for count in range(most, 0, -1) if length % count == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """Everything that changes a value in the store, and how its arrays are compressed.

    Settings that give equal values have equal hashes, however they are compressed. Facts about a
    run that do not change a value (versions, machine, date) are provenance and do not belong here.
    """

    kind: str
    """What the store holds, such as `teacher`."""
    arrays: dict[str, ArraySpec]
    """The arrays of every clip."""
    values: dict[str, JSON]
    """Checkpoint hashes, sizes, rates: any JSON. Tuples become lists."""

    def __post_init__(self) -> None:
        check_identifier(self.kind, "kind")
        if not self.arrays:
            raise ValueError(f"settings of kind {self.kind!r} have no arrays; name at least one")
        if len(self.arrays) > _MAX_ARRAYS:
            raise ValueError(f"a store holds at most {_MAX_ARRAYS} arrays, not {len(self.arrays)}")
        for name, spec in self.arrays.items():
            check_identifier(name, "array name")
            if not isinstance(spec, ArraySpec):
                raise ValueError(f"arrays.{name} is {spec!r}; it must be an ArraySpec")
        object.__setattr__(self, "arrays", dict(self.arrays))
        object.__setattr__(self, "values", plain_mapping(self.values, "values"))

    @property
    def hash(self) -> str:
        """SHA-256, in 64 hexadecimal digits, of the settings as canonical JSON.

        Canonical: keys sorted, no white space, ASCII with escapes, floats as their shortest
        decimal that reads back equal. 8 and 8.0 differ.
        """
        hashed = {
            "kind": self.kind,
            "arrays": {name: spec.hashed_dict() for name, spec in self.arrays.items()},
            "values": self.values,
        }
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name of the store's folder: kind, hyphen, first twelve digits of the hash."""
        return f"{self.kind}-{self.hash[:12]}"

    def as_dict(self) -> dict[str, JSON]:
        """The settings as they are written in `store.json`."""
        return {
            "kind": self.kind,
            "arrays": {name: spec.as_dict() for name, spec in self.arrays.items()},
            "values": self.values,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Settings read back from `store.json`; `ValueError` where they make no sense."""
        try:
            arrays = {
                name: ArraySpec(
                    dtype=spec["dtype"],
                    shape=tuple(spec["shape"]),
                    dimension_names=tuple(spec["dimension_names"]),
                    compression=spec["compression"],
                )
                for name, spec in found["arrays"].items()
            }
            return cls(kind=found["kind"], arrays=arrays, values=found["values"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"settings lack or mistype {error}") from error


def differing_settings(found: StoreSettings, wanted: StoreSettings) -> list[str]:
    """Dotted names of the settings that differ, for messages."""

    def flat(value: JSON, name: str) -> dict[str, JSON]:
        if isinstance(value, dict) and value:
            parts: dict[str, JSON] = {}
            for key, item in value.items():
                parts.update(flat(item, f"{name}.{key}" if name else key))
            return parts
        return {name: value}

    left, right = flat(found.as_dict(), ""), flat(wanted.as_dict(), "")
    missing = object()
    return sorted(
        name
        for name in left.keys() | right.keys()
        if left.get(name, missing) != right.get(name, missing)
    )
