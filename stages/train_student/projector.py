"""From the student's tokens to features whose Gram flow is compared with the teacher's.

`Student` owns one; its weights are trained with the transformer and saved beside the run.

Legend: B clip, J token in time, T frame or map of the teacher, L latent frame, H W token grid,
C channel.
"""

import torch
from torch import Tensor, nn


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
            time_weights_TJ: `local_gram_flow.time_weights`: what each token in time gives to each
                frame of the teacher; None where tokens and maps correspond one for one.
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
