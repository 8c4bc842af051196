"""Alignment of SAM2's frames and feature maps with CogVideoX's latent frames and tokens.

The causal VAE compresses time fourfold: latent 0 encodes frame 0, latent k >= 1 encodes frames
4k-3..4k. So frame f belongs to latent ceil(f / 4), and latent k >= 1 is centred on frame 4k - 1.5.

Legend: T frame, L latent frame, J token in time, M teacher map, H W grid, C channel.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TEMPORAL_COMPRESSION = 4


def latent_frame_of_frame(num_frames: int) -> Tensor:
    """Latent frame index of each frame: int64 [T].

    Raises:
        ValueError: `num_frames` is not 4N+1.
    """
    if num_frames < 1 or num_frames % TEMPORAL_COMPRESSION != 1:
        raise ValueError(f"num_frames must be 4N+1, got {num_frames}; 49 is usual")
    frame_T = torch.arange(num_frames)
    return (frame_T + TEMPORAL_COMPRESSION - 1) // TEMPORAL_COMPRESSION


def frames_to_latents(features_THWC: Tensor) -> Tensor:
    """Mean over the frames of each latent frame: features_LHWC, L = (T-1)/4 + 1."""
    latent_T = latent_frame_of_frame(features_THWC.shape[0])
    count_L = torch.bincount(latent_T)  # on the host, to avoid a device sync
    sums_LHWC = features_THWC.new_zeros(len(count_L), *features_THWC.shape[1:])
    sums_LHWC.index_add_(0, latent_T.to(features_THWC.device), features_THWC)
    return sums_LHWC / count_L[:, None, None, None].to(sums_LHWC)


def time_weights(
    num_maps: int, num_frames: int, *, patch_size_t: int = 1, frames_per_map: int | None = None
) -> Tensor | None:
    """Weights that interpolate student tokens in time to teacher maps: weights_MJ, rows sum to 1.

    Linear interpolation with each token placed at the mean of the frames that it covers, constant
    before the first token and after the last. For CogVideoX 1.0 tokens lie at frames 0 and
    4k - 1.5. (`F.interpolate` would space them evenly over the clip, up to two frames off.)

    Maps of tubelets start at frame 1, so frame 0 is left out on both sides: its token has no
    weight, and a token that also covers later frames lies at the mean of those. For CogVideoX 1.0
    and tubelets of two frames this is VideoREPA's interpolation of its tokens without the first
    latent frame (aHapBean/VideoREPA@8002687, cogvideox_t2v_align/lora_trainer.py).

    Args:
        num_maps: teacher maps M per clip: one per frame, one per latent frame or one per tubelet.
        num_frames: frames of the clip, 4N+1.
        patch_size_t: latent frames per token, 2 for CogVideoX 1.5. Padding precedes the clip, so
            the first token may cover fewer.
        frames_per_map: frames of a tubelet; None for maps of frames or latent frames.

    Returns:
        float32 weights, or None if tokens and maps correspond one to one (latent rate,
        CogVideoX 1.0).

    Raises:
        ValueError: `num_maps` is neither the frame rate nor the latent rate, or tubelets do not
            cover the frames from 1 on.
    """
    latent_of_frame = latent_frame_of_frame(num_frames).numpy()
    if frames_per_map is not None:
        return _tubelet_weights(num_maps, latent_of_frame, patch_size_t, frames_per_map)
    num_latents = int(latent_of_frame[-1]) + 1
    if num_maps not in (num_frames, num_latents):
        raise ValueError(
            f"the teacher has {num_maps} maps per clip; clips of {num_frames} frames have "
            f"{num_frames} (frame rate) or {num_latents} (latent rate)"
        )
    at_frame_rate = num_maps == num_frames
    if patch_size_t == 1 and not at_frame_rate:
        return None
    centre_J = _mean_frame(_token_of_frame(latent_of_frame, patch_size_t))
    frame_M = np.arange(num_frames) if at_frame_rate else _mean_frame(latent_of_frame)
    columns = [np.interp(frame_M, centre_J, one_hot_J) for one_hot_J in np.eye(len(centre_J))]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _tubelet_weights(
    num_maps: int, latent_of_frame: np.ndarray, patch_size_t: int, frames_per_map: int
) -> Tensor:
    """Weights of each token at the centre of each tubelet: weights_MJ."""
    num_frames = len(latent_of_frame)
    if num_maps * frames_per_map != num_frames - 1:
        raise ValueError(
            f"the teacher has {num_maps} maps of {frames_per_map} frames each; they must cover the "
            f"{num_frames - 1} frames after the first of clips of {num_frames} frames"
        )
    token_of_frame = _token_of_frame(latent_of_frame, patch_size_t)
    num_tokens = int(token_of_frame[-1]) + 1
    used_J = np.unique(token_of_frame[1:])
    frames = np.arange(1, num_frames)
    centre_J = [frames[token_of_frame[1:] == token].mean() for token in used_J]
    centre_M = frames.reshape(num_maps, frames_per_map).mean(axis=1)
    one_hot = np.eye(num_tokens)[used_J]
    columns = [np.interp(centre_M, centre_J, one_hot_J) for one_hot_J in one_hot.T]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _token_of_frame(latent_of_frame: np.ndarray, patch_size_t: int) -> np.ndarray:
    """Index of the token of each frame; padding precedes the clip."""
    num_latents = int(latent_of_frame[-1]) + 1
    tokens: np.ndarray = (latent_of_frame + -num_latents % patch_size_t) // patch_size_t
    return tokens


def _mean_frame(group_of_frame: np.ndarray) -> np.ndarray:
    """Mean frame index of each group."""
    frames = np.arange(len(group_of_frame))
    return np.bincount(group_of_frame, weights=frames) / np.bincount(group_of_frame)


def resample_to_grid(features_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Resample SAM2's square feature map to the student's token grid: features_THWC.

    SAM2 resizes every frame to a square, so both grids span the whole frame: bilinear with
    `align_corners=False`, antialiased when downsampling.
    """
    resampled_TCHW = F.interpolate(
        features_TCHW, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return resampled_TCHW.permute(0, 2, 3, 1)
