"""The interface of an extraction (one model, one or more kinds of store), and content hashes."""

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cache_schema import JSON, StoreSettings
from stages.clips import ClipRecord, ClipsConfig, ClipSkipped
from stages.extract_features.config import Kind


def sha256_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """SHA-256 over the names and bytes of a folder's files, in hexadecimal.

    Hidden files do not count: download tools leave them there. Where the folder lies and when its
    files were written does not matter.

    Raises:
        ValueError: The folder holds no file.
    """
    files = {
        file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()
    }
    names = [name for name in sorted(files) if not any(p.startswith(".") for p in name.split("/"))]
    if not names:
        raise ValueError(f"{folder} holds no files; a part of the base model was expected there")
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{sha256_of_file(files[name])}  {name}\n".encode())
    return whole.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """What a store keeps of one clip."""

    arrays: dict[str, np.ndarray]
    attributes: dict[str, JSON] = field(default_factory=dict)


Outcome = Mapping[Kind, Extracted] | ClipSkipped
"""What became of a clip: an entry for every kind, or why there is none."""


class Extraction(Protocol):
    """What one model writes: the settings of its stores, and how a clip becomes its entries."""

    settings: Mapping[Kind, StoreSettings]
    """Of every store it writes, by kind."""
    size: ClipsConfig | None
    """Of its clips; None where they are of no size, as text."""
    clips_per_batch: int
    """How many clips the model is given at once, at most."""

    def prepare(self, record: ClipRecord) -> Any:
        """Do the work that needs no model; runs in a thread, ahead of the model.

        Raises:
            ClipSkipped: The clip has no place in these stores.
        """

    def load_model(
        self, device: torch.device
    ) -> AbstractContextManager[Callable[[Sequence[Any]], Sequence[Outcome]]]:
        """Load the model; what is entered turns what `prepare` returned into outcomes, in order.

        The model is freed on leaving.
        """


def clip_settings(clips: ClipsConfig) -> dict[str, JSON]:
    """The settings by which a clip's frames are made; equal ones mean equal frames."""
    buckets: list[JSON] = [*sorted(clips.buckets)]
    return {
        "num_frames": clips.num_frames,
        "height": clips.height,
        "width": clips.width,
        "fps": clips.fps,
        "frames": "last shown at k / fps, or the next within 1 / (4 fps) where that is taken; "
        "consecutive where all intervals are within 2% of 1 / fps, or fps is null",
        "pixels": "upright; HDR and wide gamut to BT.709, interlaced by bwdif",
        "hdr": clips.hdr,
        "interlaced": clips.interlaced,
        "fit": "bicubic to cover, centre crop",
        # They decide which clips a store holds; a shard that is finished must not lack some.
        **({"buckets": buckets} if buckets else {}),
    }


def bucket_name(size: ClipsConfig | None) -> str | None:
    """What a size is called where there are several; None where there is one, or none."""
    return size.size_name if size is not None and size.buckets else None


def to_float16(values: torch.Tensor) -> np.ndarray:
    """A contiguous float16 array on the host."""
    return np.ascontiguousarray(values.to("cpu", torch.float16).numpy())


def release_memory() -> None:
    """Return the memory of models that are no longer referenced, on the host and on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
