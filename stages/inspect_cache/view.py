"""Arrays of a stored clip to draw: features as colours, implied flow, frames."""

from dataclasses import dataclass

import numpy as np
import torch

from stages.inspect_cache.feature_colours import pca_colours
from stages.local_gram_flow import (
    implied_flow,
    latent_frame_of_frame,
    local_gram_flow,
    neighbour_mask,
    radius_of_window,
)

# Legend: T moment in the store (frame or latent frame), P = T - 1 pairs, H W grid, C channel,
# K neighbour.

_SMALLEST_FULL_COLOUR = 0.2
"""Tokens per moment. Keeps the colours of a nearly static clip pale instead of magnifying noise."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipView:
    """One clip to draw; all arrays have the same T."""

    title: str
    labels: tuple[str, ...]
    """A name for each moment, such as `frame 4`."""
    colours_THWC: np.ndarray | None
    """uint8 [T, H, W, 3]: principal components as RGB; None if the store has no features."""
    flow_PHW2: np.ndarray | None
    """(dx, dy) in tokens from each moment to the next; None if the store implies none."""
    grid: tuple[int, int]
    """H and W."""
    frames_THWC: np.ndarray | None
    """uint8 [T, height, width, 3] of the dataset's clip; None if it was not found."""
    valid_T: np.ndarray
    """bool: whether training uses the moment."""

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
    """Return the flow that similarities to the next moment imply: float32 [P, H, W, 2].

    Near the grid's edge, only neighbours whose mirror image is also inside the grid are used. A
    window clipped on one side would imply an inward flow larger than the real motion.
    """
    _, height, width, neighbours = similarities_PHWK.shape
    inside_HWK = neighbour_mask(height, width, radius_of_window(neighbours))
    mirrored_HWK = inside_HWK & inside_HWK.flip(-1)
    balanced_PHWK = similarities_PHWK.masked_fill(~mirrored_HWK, -1e4 * temperature)
    flow_PHW2: np.ndarray = implied_flow(balanced_PHWK[None], temperature)[0].numpy()
    return flow_PHW2


def view_clip(
    features_THWC: np.ndarray | None,
    flow_PHW2: np.ndarray | None,
    *,
    title: str,
    num_frames: int,
    frames_THWC: np.ndarray | None,
    valid_T: np.ndarray | None,
) -> ClipView:
    """Make the view of a stored clip, at frame rate or at latent rate.

    Args:
        features_THWC: the clip's features, shown as colours; None if only their flow is stored.
        flow_PHW2: the flow to the next moment; None omits it.
        title: Shown above the image.
        num_frames: Frames of the clip; T equals it at frame rate.
        frames_THWC: uint8, the clip's `num_frames` frames, or None.
        valid_T: bool, the valid moments; None if all are.

    Raises:
        ValueError: T fits neither `num_frames` nor its latent frames.
    """
    if features_THWC is not None:
        num_moments, height, width = features_THWC.shape[:3]
    else:
        assert flow_PHW2 is not None, "a view shows something"
        num_moments, height, width = len(flow_PHW2) + 1, *flow_PHW2.shape[1:3]
    moments = frames_of_moments(num_moments, num_frames)
    return ClipView(
        title=title,
        labels=tuple(f"frame {frame}" for frame in moments),
        colours_THWC=None if features_THWC is None else pca_colours(features_THWC, valid_T),
        flow_PHW2=flow_PHW2,
        grid=(height, width),
        frames_THWC=None if frames_THWC is None else frames_THWC[moments],
        valid_T=np.ones(len(moments), bool) if valid_T is None else valid_T,
    )


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
