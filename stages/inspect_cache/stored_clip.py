"""Reading a stored clip as features or implied flow, for drawing."""

# Legend: T moment in the store (frame or latent frame), P pair of moments, H W grid, C G channel,
# K neighbour.

from dataclasses import dataclass

import numpy as np
import torch

from cache_schema import StoreReader
from stages.clips import ClipsConfig
from stages.inspect_cache.view import flow_of_features, flow_of_similarities
from stages.local_gram_flow import radius_of_window, regrid_fused
from stages.teacher_store.features import decode_features
from stages.teacher_store.gram_flow import decode_gram_flow, narrow_window
from stages.teacher_store.settings import native_parts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredClip:
    """Features, flow, or both; T = P + 1."""

    features_THWC: np.ndarray | None
    flow_PHW2: np.ndarray | None
    valid_T: np.ndarray | None
    """bool; None if all moments are valid."""
    notes: tuple[str, ...]
    """Notes for the user on how the data was converted."""

    @property
    def grid(self) -> tuple[int, int]:
        """H and W."""
        shown = self.flow_PHW2 if self.features_THWC is None else self.features_THWC
        assert shown is not None, "a store holds something"
        return shown.shape[1], shown.shape[2]


def read_clip(
    reader: StoreReader, key: str, clips: ClipsConfig, *, radius: int, temperature: float
) -> StoredClip:
    """Read a clip of a teacher, gram_flow or latents store.

    Args:
        clips: the training size, to which features on SAM2's own grid are resampled.
        radius: half the window of the flow; limited to the window of a gram_flow store.
        temperature: softmax temperature of the flow.

    Raises:
        CacheError: No such clip, or one that fails its checks.
        ValueError: A store without a `valid` array.
    """
    if reader.settings.kind == "latents":
        mean_THWC = reader.read(key, ["mean"])["mean"].transpose(0, 2, 3, 1)
        return StoredClip(features_THWC=mean_THWC, flow_PHW2=None, valid_T=None, notes=())
    arrays = reader.read(key, sorted({*reader.settings.arrays, "valid"}))
    valid_T = arrays.pop("valid") != 0
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if reader.settings.kind == "gram_flow":
        stored_PHWK = decode_gram_flow(tensors)
        stored = radius_of_window(stored_PHWK.shape[-1])
        shown_PHWK = narrow_window(stored_PHWK, stored, min(radius, stored))
        notes = [f"flow of radius {stored}, the largest stored"] if radius > stored else []
        if reader.settings.values.get("pairs") == "crossed":
            notes.append("flow of the backward track; the forward track's flow runs back in time")
        return StoredClip(
            features_THWC=None,
            flow_PHW2=flow_of_similarities(shown_PHWK, temperature),
            valid_T=valid_T,
            notes=tuple(notes),
        )
    features_THWC, regrid_notes = _on_training_grid(decode_features(tensors), reader, clips)
    return StoredClip(
        features_THWC=features_THWC,
        flow_PHW2=flow_of_features(features_THWC, radius, temperature),
        valid_T=valid_T,
        notes=regrid_notes,
    )


def _on_training_grid(
    fused_THWG: torch.Tensor, reader: StoreReader, clips: ClipsConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    parts = native_parts(reader.settings)
    if parts is None:
        return fused_THWG.numpy(), ()
    height, width = fused_THWG.shape[1:3]
    to_height, to_width = clips.token_grid
    note = f"{height}x{width} tokens resampled to {to_height}x{to_width}, as in training"
    return regrid_fused(fused_THWG, to_height, to_width, parts).numpy(), (note,)
