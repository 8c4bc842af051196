"""What a store holds of one clip, as features or flow to be looked at; used by `draw_store`."""

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
    """One of features and flow, or both; T = P + 1."""

    features_THWC: np.ndarray | None
    flow_PHW2: np.ndarray | None
    valid_T: np.ndarray | None
    """bool; None where all moments count."""
    notes: tuple[str, ...]
    """What was done to it, for people."""

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
        clips: the training size, to which features on SAM2's own grid are brought.
        radius: half the window of the flow; a gram_flow store with a smaller one shows that.
        temperature: of the flow's softmax.

    Raises:
        CacheError: No such clip, or one that does not pass its checks.
        ValueError: A store that does not say which moments are valid.
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
        about = [f"the flow of radius {stored}, all that is stored"] if radius > stored else []
        if reader.settings.values.get("pairs") == "crossed":
            about.append(
                "the flow of the backward track; that of the forward one runs back in time"
            )
        return StoredClip(
            features_THWC=None,
            flow_PHW2=flow_of_similarities(shown_PHWK, temperature),
            valid_T=valid_T,
            notes=tuple(about),
        )
    features_THWC, notes = _on_the_grid(decode_features(tensors), reader, clips)
    return StoredClip(
        features_THWC=features_THWC,
        flow_PHW2=flow_of_features(features_THWC, radius, temperature),
        valid_T=valid_T,
        notes=notes,
    )


def _on_the_grid(
    fused_THWG: torch.Tensor, reader: StoreReader, clips: ClipsConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    parts = native_parts(reader.settings)
    if parts is None:
        return fused_THWG.numpy(), ()
    height, width = fused_THWG.shape[1:3]
    to_height, to_width = clips.token_grid
    note = f"{height}x{width} tokens are shown as training reads them, at {to_height}x{to_width}"
    return regrid_fused(fused_THWG, to_height, to_width, parts).numpy(), (note,)
