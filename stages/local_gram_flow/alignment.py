"""Where SAM2's frames and pixels lie on CogVideoX's latents and tokens.

The causal VAE compresses time fourfold: latent 0 sees frame 0 alone, latent k sees frames 4k-3..4k,
so frame f belongs to latent ceil(f / 4), and latent k >= 1 is centred on frame 4k - 1.5.

Legend: B clip, T frame, L latent frame, H W grid, C channel.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TEMPORAL_COMPRESSION = 4


def latent_frame_of_frame(num_frames: int) -> Tensor:
    """Index of the latent frame that each frame belongs to: int64 [T].

    Raises:
        ValueError: `num_frames` is not 4N+1.
    """
    if num_frames < 1 or num_frames % TEMPORAL_COMPRESSION != 1:
        raise ValueError(f"num_frames must be 4N+1, got {num_frames}; 49 is usual")
    frame_T = torch.arange(num_frames)
    return (frame_T + TEMPORAL_COMPRESSION - 1) // TEMPORAL_COMPRESSION


def frames_to_latents(features_THWC: Tensor) -> Tensor:
    """Mean of each latent frame's frames: features_LHWC, L = (T-1)/4 + 1."""
    latent_T = latent_frame_of_frame(features_THWC.shape[0]).to(features_THWC.device)
    count_L = torch.bincount(latent_T)
    sums_LHWC = features_THWC.new_zeros(len(count_L), *features_THWC.shape[1:])
    sums_LHWC.index_add_(0, latent_T, features_THWC)
    return sums_LHWC / count_L[:, None, None, None].to(features_THWC.dtype)


def latents_to_frames(features_BLHWC: Tensor, num_frames: int) -> Tensor:
    """Linear interpolation from latent to frame rate, knots at frames 0 and 4k - 1.5.

    Frames after the last knot take its value. (`F.interpolate` would spread the knots evenly over
    the clip, which is up to two frames off.)

    Returns:
        features_BTHWC, T = num_frames.

    Raises:
        ValueError: the number of latent frames does not fit `num_frames`.
    """
    num_latents = int(latent_frame_of_frame(num_frames)[-1]) + 1
    if features_BLHWC.shape[1] != num_latents:
        raise ValueError(
            f"{num_frames} frames have {num_latents} latent frames, got {features_BLHWC.shape[1]}"
        )
    weights_TL = interpolation_weights(num_frames).to(features_BLHWC)
    return torch.einsum("tl,blhwc->bthwc", weights_TL, features_BLHWC)


def interpolation_weights(num_frames: int) -> Tensor:
    """Weight of each latent frame in each frame, rows summing to 1: float64 weights_TL."""
    num_latents = int(latent_frame_of_frame(num_frames)[-1]) + 1
    knots_L = torch.arange(num_latents, dtype=torch.float64) * TEMPORAL_COMPRESSION - 1.5
    knots_L[0] = 0.0
    frame_T = torch.arange(num_frames, dtype=torch.float64).clamp(max=float(knots_L[-1]))
    right_T = torch.searchsorted(knots_L, frame_T).clamp(1, max(num_latents - 1, 1))
    weights_TL = torch.zeros(num_frames, num_latents, dtype=torch.float64)
    if num_latents == 1:
        weights_TL[:, 0] = 1.0
        return weights_TL
    left_T = right_T - 1
    share_T = (frame_T - knots_L[left_T]) / (knots_L[right_T] - knots_L[left_T])
    weights_TL.scatter_(1, left_T[:, None], (1 - share_T)[:, None])
    weights_TL.scatter_(1, right_T[:, None], share_T[:, None])
    return weights_TL


def resample_to_grid(features_TCHW: Tensor, height: int, width: int) -> Tensor:
    """SAM2's square feature map on the student's token grid: features_THWC.

    SAM2 squashes the frame to a square, so both grids span the same picture: bilinear with
    `align_corners=False`, antialiased where the grid gets coarser.
    """
    resampled_TCHW = F.interpolate(
        features_TCHW, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return resampled_TCHW.permute(0, 2, 3, 1)
