"""A shard's Zarr v3 group: how its arrays are laid out, written; the only use of zarr.

One array per name of the settings, with a leading clip axis. A Zarr shard holds one clip, an inner
chunk one frame of it or several small ones, each inner chunk with a CRC-32C.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schema.places import LocalPlace
from cache_schema.sealed_json import crc32c_hex, parse_json
from cache_schema.settings import CLIP_DIMENSION, ArraySpec, Compression, StoreSettings

if TYPE_CHECKING:
    import zarr

METADATA_FILE = "zarr.json"

_BLOSC_BLOCK_BYTES = 2**19
"""Blosc's own choice, 32 KiB here, takes longer to decode and up to an eighth more space."""


def chunk_path(name: str, spec: ArraySpec, index: int) -> str:
    """The file of clip `index` of an array, relative to the group."""
    return f"{name}/c.{index}" + ".0" * len(spec.shape)


def metadata_paths(settings: StoreSettings) -> list[str]:
    """Zarr's own files, relative to the group."""
    return [METADATA_FILE, *(f"{name}/{METADATA_FILE}" for name in settings.arrays)]


def create_group(path: Path, settings: StoreSettings, num_clips: int) -> "dict[str, ClipArray]":
    """Write the metadata of a group of `num_clips` clips, whose chunks may be there already.

    The bytes depend on the settings and `num_clips` alone. Files of an earlier attempt at the same
    paths are replaced.
    """
    for relative in metadata_paths(settings):
        (path / relative).unlink(missing_ok=True)
    # Here, since zarr takes as long to import as `--help` may, and readers do without it.
    import zarr

    group = zarr.create_group(str(path), zarr_format=3)
    return {
        name: ClipArray(_create_array(group, name, spec, num_clips))
        for name, spec in settings.arrays.items()
    }


def _create_array(group: "zarr.Group", name: str, spec: ArraySpec, num_clips: int) -> Any:
    is_float = spec.numpy_dtype.kind == "f"
    item_bytes = spec.numpy_dtype.itemsize
    from zarr.codecs import BloscCodec, Crc32cCodec

    packing: dict[Compression, list[BloscCodec]] = {
        "none": [],
        "blosc-zstd-shuffle": [
            BloscCodec(
                cname="zstd",
                clevel=1,
                shuffle="shuffle",
                typesize=item_bytes,
                blocksize=_BLOSC_BLOCK_BYTES,
            )
        ],
    }
    return group.create_array(
        name,
        shape=(num_clips, *spec.shape),
        dtype=spec.dtype,
        shards=(1, *spec.shape),
        chunks=(1, spec.chunk_length, *spec.shape[1:]),
        filters=None,
        compressors=[*packing[spec.compression], Crc32cCodec()],
        fill_value=math.nan if is_float else 0,
        # Without folders on the way to it, each clip's file costs one inode.
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=[CLIP_DIMENSION, *spec.dimension_names],
        # Without it a clip that equals the fill value has no file.
        config={"write_empty_chunks": True},
    )


def found_compression(group: Path, name: str) -> Compression | None:
    """How an array of a group is compressed, by its metadata; None where that cannot be told."""
    try:
        metadata = parse_json(LocalPlace(group / name).read(METADATA_FILE))
        inner = metadata["codecs"][0]["configuration"]["codecs"]
        names = {codec["name"] for codec in inner}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return "blosc-zstd-shuffle" if "blosc" in names else "none"


class ClipArray:
    """One array of a group, written clip by clip."""

    def __init__(self, array: Any) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of clips, then the clip's axes."""
        return tuple(self._array.shape)

    def write(self, index: int, values: np.ndarray) -> None:
        """Write one clip in a single assignment, growing the clip axis to hold it.

        Anything smaller than a clip would rewrite the clip's file each time.
        """
        if self.shape[0] <= index:
            self._array.resize((index + 1, *self.shape[1:]))
        self._array[index : index + 1] = values[np.newaxis]


def content_crc32c(values: np.ndarray) -> str:
    """CRC-32C of the values in C order and little-endian."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return crc32c_hex(little.reshape(-1).view(np.uint8))
