"""Interface of an extraction: one model, one or more kinds of stores."""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from cache_schema import JSON, StoreSettings
from stages.clips import ClipsConfig, ClipSkipped
from stages.extract_features.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """One clip's entry in a store."""

    arrays: dict[str, np.ndarray]
    attributes: dict[str, JSON] = field(default_factory=dict)


Outcome = Mapping[Kind, Extracted] | ClipSkipped
"""Result for a clip: an entry per kind, or the reason why it was skipped."""


class Extraction(Protocol):
    """One model's extraction: settings of its stores, and computation of a clip's entries."""

    settings: Mapping[Kind, StoreSettings]
    """Settings of each store, by kind."""
    size: ClipsConfig | None
    """Size of the clips; None for text, which has no size."""
    clips_per_batch: int
    """Maximum number of clips per call of the model."""

    def prepare(self, record: Any) -> Any:
        """Prepare a clip without the model, such as decoding it; runs ahead in a thread.

        Args:
            record: The clip in the input: a `ClipRecord` of the dataset, or an entry of a store.

        Raises:
            ClipSkipped: The clip cannot be extracted.
        """

    def load_model(
        self, device: torch.device
    ) -> AbstractContextManager[Callable[[Sequence[Any]], Sequence[Outcome]]]:
        """Load the model; the context yields a function from prepared clips to outcomes, in order.

        The model is freed on exit.
        """


def clip_settings(clips: ClipsConfig) -> dict[str, JSON]:
    """Return the settings that determine a clip's frames; equal settings give equal frames."""
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
        # They determine which clips a store holds; a finished shard must not lack any.
        **({"buckets": buckets} if buckets else {}),
    }


def bucket_name(size: ClipsConfig | None) -> str | None:
    """Return the name of a size bucket; None without buckets or without a size."""
    return size.size_name if size is not None and size.buckets else None


def release_memory() -> None:
    """Free the memory of models that are no longer referenced, on the host and on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
