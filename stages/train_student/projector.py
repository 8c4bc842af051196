"""From the student's tokens to features whose Gram flow is compared with the teacher's.

`Student` owns one; its weights are trained with the transformer and saved beside the run.

Legend: B clip, J token in time, T frame or map of the teacher, L latent frame, H W token grid,
C channel.
"""

import numpy as np
import torch
from torch import Tensor, nn

from stages.local_gram_flow import latent_frame_of_frame


class Projector(nn.Module):
    """A small MLP with a residual skip on every token, then the teacher's frame rate.

    Tokens are normalised, pass two hidden layers (each with norm and SiLU) and an output layer, and
    a linear skip is added. Where the teacher has one map per frame, the result is interpolated to
    frames and passes a depthwise convolution over time.
    """

    def __init__(
        self, width: int, widths: tuple[int, int, int], time_weights_TJ: Tensor | None
    ) -> None:
        """Build the layers.

        Args:
            width: channels of the transformer's tokens.
            widths: channels of the two hidden layers and of the output.
            time_weights_TJ: weight of each token in time in each frame of the teacher; None where
                there are as many tokens in time as maps of the teacher, one for one.
        """
        super().__init__()
        first, second, out = widths
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, first),
            nn.LayerNorm(first),
            nn.SiLU(),
            nn.Linear(first, second),
            nn.LayerNorm(second),
            nn.SiLU(),
            nn.Linear(second, out),
        )
        self.skip = nn.Linear(width, out, bias=False)
        self.register_buffer("time_weights_TJ", time_weights_TJ, persistent=False)
        self.smooth = None if time_weights_TJ is None else TemporalConvolution(out)

    def forward(self, tokens_BJHWC: Tensor) -> Tensor:
        """Project tokens_BJHWC of the transformer's width: features_BTHWC of the last width."""
        normed_BJHWC = self.norm(tokens_BJHWC)
        features_BJHWC = self.layers(normed_BJHWC) + self.skip(normed_BJHWC)
        if self.smooth is None:
            return features_BJHWC
        features_BTHWC = torch.einsum("tj,bjhwc->bthwc", self.time_weights_TJ, features_BJHWC)
        return self.smooth(features_BTHWC)


class TemporalConvolution(nn.Module):
    """Each channel's own three taps over time; starts as the identity, the end frames repeat."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps_3C = torch.zeros(3, channels)
        taps_3C[1] = 1.0
        self.taps_3C = nn.Parameter(taps_3C)

    def forward(self, features_BTHWC: Tensor) -> Tensor:
        """Convolve over T; the shape stays."""
        before = torch.cat([features_BTHWC[:, :1], features_BTHWC[:, :-1]], dim=1)
        after = torch.cat([features_BTHWC[:, 1:], features_BTHWC[:, -1:]], dim=1)
        taps = self.taps_3C
        return taps[0] * before + taps[1] * features_BTHWC + taps[2] * after


def time_weights(num_maps: int, num_frames: int, patch_size_t: int) -> Tensor | None:
    """How tokens in time make the teacher's maps: weights_TJ, rows summing to 1, or None.

    Linear interpolation between tokens, each standing at the mean of the frames it covers. For
    CogVideoX 1.0 at frame rate that is `local_gram_flow.latents_to_frames`.

    Args:
        num_maps: maps of the teacher's store: one per frame or one per latent frame.
        num_frames: frames of the clip, 4N+1.
        patch_size_t: latent frames per token; padding lies before the clip, so that the first
            token may cover fewer.

    Returns:
        None where token and map correspond one for one (latent rate, CogVideoX 1.0).

    Raises:
        ValueError: `num_maps` is neither.
    """
    latent_of_frame = latent_frame_of_frame(num_frames).numpy()
    num_latents = int(latent_of_frame[-1]) + 1
    if num_maps not in (num_frames, num_latents):
        raise ValueError(
            f"the teacher has {num_maps} maps per clip; clips of {num_frames} frames have "
            f"{num_frames} (frame rate) or {num_latents} (latent rate)"
        )
    at_frame_rate = num_maps == num_frames
    if patch_size_t == 1 and not at_frame_rate:
        return None
    token_of_frame = (latent_of_frame + -num_latents % patch_size_t) // patch_size_t
    centre_J = _mean_frame(token_of_frame)
    place_T = np.arange(num_frames) if at_frame_rate else _mean_frame(latent_of_frame)
    columns = [np.interp(place_T, centre_J, one_hot_J) for one_hot_J in np.eye(len(centre_J))]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _mean_frame(group_of_frame: np.ndarray) -> np.ndarray:
    """Mean frame number of each group."""
    frames = np.arange(len(group_of_frame))
    return np.bincount(group_of_frame, weights=frames) / np.bincount(group_of_frame)
