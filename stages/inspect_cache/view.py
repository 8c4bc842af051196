"""What there is to see of one clip in a store, as arrays; `picture` lays it out."""

from dataclasses import dataclass

import numpy as np
import torch

from stages.inspect_cache.feature_colours import pca_colours
from stages.local_gram_flow import (
    implied_flow,
    latent_frame_of_frame,
    local_gram_flow,
    neighbour_mask,
)

# Legend: T moment in the store (frame or latent frame), P = T - 1 pairs, H W grid, C channel.

_SMALLEST_FULL_COLOUR = 0.2
"""Tokens per step. A clip that hardly moves is shown hardly coloured, not as magnified noise."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipView:
    """One clip, ready to be laid out; every array has the same T."""

    title: str
    labels: tuple[str, ...]
    """A name for each moment: frame 4."""
    colours_THWC: np.ndarray
    """uint8 [T, H, W, 3]: principal components as colours."""
    flow_PHW2: np.ndarray | None
    """(dx, dy) in tokens from each moment to the next; None where the store implies none."""
    frames_THWC: np.ndarray | None
    """uint8 [T, height, width, 3] of the dataset's clip; None where it was not found."""
    valid_T: np.ndarray
    """bool: whether the moment counts in training."""

    @property
    def largest_flow(self) -> float:
        """The length in tokens that gets full colour: the 99th percentile of valid pairs."""
        if self.flow_PHW2 is None:
            return _SMALLEST_FULL_COLOUR
        lengths = np.hypot(self.flow_PHW2[..., 0], self.flow_PHW2[..., 1])
        known_P = self.valid_T[:-1] & self.valid_T[1:]
        if not known_P.any():
            return _SMALLEST_FULL_COLOUR
        return max(float(np.percentile(lengths[known_P], 99)), _SMALLEST_FULL_COLOUR)


def flow_of_features(features_THWC: np.ndarray, radius: int, temperature: float) -> np.ndarray:
    """Return the flow that the Local Gram Flow of one clip implies: float32 [T-1, H, W, 2].

    Near the grid's edge only neighbours whose mirror image is inside too count. Windows that are
    cut on one side would make every edge seem to flow inwards, more than anything really moves.

    Args:
        features_THWC: any real dtype, T >= 2.
        radius: Half the window, in tokens.
        temperature: Of the softmax over neighbours.
    """
    features_BTHWC = torch.from_numpy(features_THWC.astype(np.float32))[None]
    similarities_BPHWK = local_gram_flow(features_BTHWC, radius)
    _, height, width, _ = features_THWC.shape
    inside_HWK = neighbour_mask(height, width, radius)
    mirrored_HWK = inside_HWK & inside_HWK.flip(-1)
    balanced_BPHWK = similarities_BPHWK.masked_fill(~mirrored_HWK, -1e4 * temperature)
    flow_PHW2: np.ndarray = implied_flow(balanced_BPHWK, temperature)[0].numpy()
    return flow_PHW2


def view_features(
    features_THWC: np.ndarray,
    *,
    title: str,
    num_frames: int,
    frames_THWC: np.ndarray | None,
    valid_T: np.ndarray | None,
    flow: tuple[int, float] | None,
) -> ClipView:
    """Make a view of features at frame rate or at latent rate.

    Args:
        features_THWC: one clip's tokens.
        title: Shown above the picture.
        num_frames: Frames of the clip; with T it tells the rate.
        frames_THWC: uint8, the clip's `num_frames` frames, or None.
        valid_T: bool, the moments that count; None where all do.
        flow: Radius and temperature of the implied flow; None leaves it out.

    Raises:
        ValueError: T fits neither `num_frames` nor its latent frames.
    """
    moments = frames_of_moments(len(features_THWC), num_frames)
    return ClipView(
        title=title,
        labels=tuple(f"frame {frame}" for frame in moments),
        colours_THWC=pca_colours(features_THWC, valid_T),
        flow_PHW2=None if flow is None else flow_of_features(features_THWC, *flow),
        frames_THWC=None if frames_THWC is None else frames_THWC[moments],
        valid_T=np.ones(len(moments), bool) if valid_T is None else valid_T,
    )


def frames_of_moments(num_moments: int, num_frames: int) -> list[int]:
    """Return the frame that stands for each moment of a store: itself, or a group's last.

    Raises:
        ValueError: the store has neither the clip's frames nor its latent frames.
    """
    if num_moments == num_frames:
        return list(range(num_frames))
    last_frames = {int(latent): f for f, latent in enumerate(latent_frame_of_frame(num_frames))}
    if num_moments == len(last_frames):
        return list(last_frames.values())
    raise ValueError(
        f"the store has {num_moments} moments a clip, but data.num_frames={num_frames} makes "
        f"{num_frames} frames or {len(last_frames)} latent frames; inspect it with the "
        "configuration it was made with"
    )
