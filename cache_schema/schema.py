"""Settings of a store: its kind, its arrays, the values that determine them, and their hash."""

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
"""Data types a store can hold; all are part of the Zarr v3 specification."""

CLIP_DIMENSION = "clip"

Compression = Literal["none", "blosc-zstd-shuffle"]
"""Compression of inner chunks; `blosc-zstd-shuffle` is Zstandard level 1 after Blosc's byte
shuffle."""

MAX_SHARED_CHUNK_BYTES = 2**20

MAX_ARRAY_BYTES = 2**33
"""Maximum size of one array of a clip; bounds the memory that an untrusted `store.json` can make a
reader allocate."""

MAX_CHUNKS = 2**16
"""Maximum number of inner chunks of one array of a clip."""

_MAX_ARRAYS = 64
_MAX_AXES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of every clip: its data type, its shape without the clip axis, the axes' names.

    The leading axis (usually frames) is the one that is split into inner chunks.
    """

    dtype: str
    """Name of the data type, such as `float16`; see `DTYPES`."""
    shape: tuple[int, ...]
    """Sizes for one clip, for example (t, h, w, c)."""
    dimension_names: tuple[str, ...]
    """One name per axis of `shape`."""
    compression: Compression = "none"
    """How the array is compressed on disk. It changes no value, so it is not part of the hash."""

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
                f"{MAX_ARRAY_BYTES / 2**30:g} GiB per clip can be stored"
            )
        if self.num_chunks > MAX_CHUNKS:
            raise ValueError(
                f"shape is {shape} of {self.dtype}, which takes {self.num_chunks} inner chunks; at "
                f"most {MAX_CHUNKS} can be stored: make the leading axis shorter"
            )

    @property
    def chunk_length(self) -> int:
        """Entries of the leading axis per inner chunk.

        One frame of a teacher's features, so that single frames can be read. Smaller entries are
        combined, as many as divide the axis evenly and fit in `MAX_SHARED_CHUNK_BYTES`, since every
        inner chunk costs time regardless of its size.
        """
        return _chunk_length(self.shape[0], self.num_bytes // self.shape[0], MAX_SHARED_CHUNK_BYTES)

    @property
    def num_chunks(self) -> int:
        """Inner chunks of one clip."""
        return self.shape[0] // self.chunk_length

    @property
    def num_bytes(self) -> int:
        """Uncompressed size of one clip's values."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The NumPy data type, in native byte order."""
        return np.dtype(self.dtype)

    def as_dict(self) -> dict[str, JSON]:
        """The specification as written in `store.json`."""
        return {**self.hashed_dict(), "compression": self.compression}

    def hashed_dict(self) -> dict[str, JSON]:
        """The part of the specification that is hashed: everything that affects values."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "dimension_names": list(self.dimension_names),
        }


@lru_cache(maxsize=64)
def _chunk_length(length: int, entry_bytes: int, chunk_bytes: int) -> int:
    longest = max(1, min(length, chunk_bytes // entry_bytes))
    return next(count for count in range(longest, 0, -1) if length % count == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """Everything that affects values in the store, and how its arrays are compressed.

    Equal settings have equal hashes, regardless of compression. Facts about a run that do not
    affect values (versions, machine, date) are provenance and do not belong here.
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
        """The settings as written in `store.json`."""
        return {
            "kind": self.kind,
            "arrays": {name: spec.as_dict() for name, spec in self.arrays.items()},
            "values": self.values,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Settings read from `store.json`; `ValueError` if they are invalid."""
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
            raise ValueError(f"settings have a missing or mistyped member: {error}") from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name; an empty mapping inside another is a value."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def differing_settings(found: StoreSettings, wanted: StoreSettings) -> list[str]:
    """Dotted names of the settings that differ, for error messages."""
    left, right = flatten(found.as_dict()), flatten(wanted.as_dict())
    missing = object()
    return sorted(
        name
        for name in left.keys() | right.keys()
        if left.get(name, missing) != right.get(name, missing)
    )
