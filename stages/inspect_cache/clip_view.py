"""A stored clip as it is drawn: features as colours, and the flow that they imply."""

# Legend: T moment in the store (frame or latent frame), P = T - 1 pairs of moments, H W grid,
# C G channel, K neighbour.

from dataclasses import dataclass

import numpy as np
import torch

from cache_schema import StoreReader
from stages.clips import ClipsConfig
from stages.inspect_cache.colours import pca_colours
from stages.local_gram_flow import (
    implied_motion,
    latent_frame_of_frame,
    local_gram_flow,
    radius_of_window,
    regrid_fused,
)
from stages.teacher_store.features import decode_features
from stages.teacher_store.gram_flow import decode_gram_flow, narrow_window
from stages.teacher_store.settings import native_parts

_SMALLEST_FULL_COLOUR = 0.2
"""Tokens per moment. Keeps the colours of a nearly static clip pale instead of magnifying noise."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipView:
    """Colours, flow, or both; all arrays have the same T."""

    frames: tuple[int, ...]
    """The clip's frame of each moment."""
    colours_THWC: np.ndarray | None
    """uint8 [T, H, W, 3]: principal components as RGB; None if the store has no features."""
    flow_PHW2: np.ndarray | None
    """(dx, dy) in tokens from each moment to the next; None if the store implies none."""
    valid_T: np.ndarray
    """bool: whether training uses the moment."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data was converted."""

    @property
    def grid(self) -> tuple[int, int]:
        """H and W."""
        shown = self.flow_PHW2 if self.colours_THWC is None else self.colours_THWC
        assert shown is not None, "a view shows something"
        return shown.shape[1], shown.shape[2]

    @property
    def num_drawn(self) -> int:
        """Number of moments that can be drawn: the last has no flow."""
        return len(self.frames) if self.flow_PHW2 is None else len(self.flow_PHW2)

    @property
    def largest_flow(self) -> float:
        """The length in tokens drawn at full saturation: the 99th percentile of valid pairs."""
        if self.flow_PHW2 is None:
            return _SMALLEST_FULL_COLOUR
        lengths = np.hypot(self.flow_PHW2[..., 0], self.flow_PHW2[..., 1])
        known_P = self.valid_T[:-1] & self.valid_T[1:]
        if not known_P.any():
            return _SMALLEST_FULL_COLOUR
        return max(float(np.percentile(lengths[known_P], 99)), _SMALLEST_FULL_COLOUR)


def stored_clips(reader: StoreReader, data: ClipsConfig) -> ClipsConfig:
    """The dataset's settings, with the length, size and frame rate of the store's clips."""
    recorded = reader.settings.values.get("clips")
    if not isinstance(recorded, dict) or not recorded:
        return data.sizes[0]
    known = {name: recorded[name] for name in type(data).model_fields if name in recorded}
    return data.model_copy(update=known | {"buckets": ()})


def read_clip(
    reader: StoreReader, key: str, clips: ClipsConfig, *, radius: int, temperature: float
) -> ClipView:
    """Read a clip of a teacher, gram_flow or latents store.

    Args:
        clips: the training size, to which features on SAM2's own grid are resampled.
        radius: half the window of the flow; limited to the window of a gram_flow store.
        temperature: softmax temperature of the flow.

    Raises:
        CacheError: No such clip, or one that fails its checks.
        ValueError: A store without a `valid` array, or of clips of another length.
    """
    if reader.settings.kind == "latents":
        mean_THWC = reader.read(key, ["mean"])["mean"].transpose(0, 2, 3, 1)
        return view_clip(mean_THWC, None, num_frames=clips.num_frames)
    arrays = reader.read(key, sorted({*reader.settings.arrays, "valid"}))
    valid_T = arrays.pop("valid") != 0
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    notes = []
    features_THWC = None
    if reader.settings.kind == "gram_flow":
        stored_PHWK = decode_gram_flow(tensors)
        stored = radius_of_window(stored_PHWK.shape[-1])
        shown_PHWK = narrow_window(stored_PHWK, stored, min(radius, stored))
        if radius > stored:
            notes.append(f"flow of radius {stored}, the largest stored")
        if reader.settings.values.get("pairs") == "crossed":
            notes.append("flow of the backward track; the forward track's flow runs back in time")
        flow_PHW2 = flow_of_similarities(shown_PHWK, temperature)
    else:
        fused_THWG = decode_features(tensors)
        parts = native_parts(reader.settings)
        if parts is not None:
            (height, width), to = fused_THWG.shape[1:3], clips.token_grid
            fused_THWG = regrid_fused(fused_THWG, *to, parts)
            notes.append(f"{height}x{width} tokens resampled to {to[0]}x{to[1]}, as in training")
        features_THWC = fused_THWG.numpy()
        flow_PHW2 = flow_of_features(features_THWC, radius, temperature)
    return view_clip(
        features_THWC,
        flow_PHW2,
        num_frames=clips.num_frames,
        valid_T=valid_T,
        notes=tuple(notes),
    )


def view_clip(
    features_THWC: np.ndarray | None,
    flow_PHW2: np.ndarray | None,
    *,
    num_frames: int,
    valid_T: np.ndarray | None = None,
    notes: tuple[str, ...] = (),
) -> ClipView:
    """Make the view of a stored clip, at frame rate or at latent rate.

    Args:
        features_THWC: the clip's features, shown as colours; None if only their flow is stored.
        flow_PHW2: the flow to the next moment; None omits it.
        num_frames: Frames of the clip; T equals it at frame rate.
        valid_T: bool, the valid moments; None if all are.
        notes: Passed on.

    Raises:
        ValueError: T fits neither `num_frames` nor its latent frames.
    """
    if features_THWC is not None:
        num_moments = len(features_THWC)
    else:
        assert flow_PHW2 is not None, "a view shows something"
        num_moments = len(flow_PHW2) + 1
    return ClipView(
        frames=tuple(frames_of_moments(num_moments, num_frames)),
        colours_THWC=None if features_THWC is None else pca_colours(features_THWC, valid_T),
        flow_PHW2=flow_PHW2,
        valid_T=np.ones(num_moments, bool) if valid_T is None else valid_T,
        notes=notes,
    )


def flow_of_features(features_THWC: np.ndarray, radius: int, temperature: float) -> np.ndarray:
    """Return the flow that the Local Gram Flow of one clip implies: float32 [T-1, H, W, 2].

    Args:
        features_THWC: any real dtype, T >= 2.
        radius: Half the window, in tokens.
        temperature: Temperature of the softmax over neighbours.
    """
    features_BTHWC = torch.from_numpy(features_THWC.astype(np.float32))[None]
    return flow_of_similarities(local_gram_flow(features_BTHWC, radius)[0], temperature)


def flow_of_similarities(similarities_PHWK: torch.Tensor, temperature: float) -> np.ndarray:
    """Return the motion that similarities to the next moment imply: float32 [P, H, W, 2]."""
    flow_PHW2: np.ndarray = implied_motion(similarities_PHWK[None], temperature)[0].numpy()
    return flow_PHW2


def frames_of_moments(num_moments: int, num_frames: int) -> list[int]:
    """Return the frame shown for each moment: the frame itself, or the last of a latent's group.

    Raises:
        ValueError: `num_moments` is neither the number of frames nor of latent frames.
    """
    if num_moments == num_frames:
        return list(range(num_frames))
    last_frames = {int(latent): f for f, latent in enumerate(latent_frame_of_frame(num_frames))}
    if num_moments == len(last_frames):
        return list(last_frames.values())
    raise ValueError(
        f"the store has {num_moments} moments per clip, but data.num_frames={num_frames} gives "
        f"{num_frames} frames or {len(last_frames)} latent frames; use the configuration that the "
        "store was made with"
    )
