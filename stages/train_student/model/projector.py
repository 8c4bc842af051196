"""From the student's tokens to what an objective compares with the teacher.

`Student` owns one for each objective; they are trained with the transformer and saved beside the
run.

Legend: B clip, J token in time, T map of the objective, H W token grid, C channel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """A small MLP with a residual skip on every token, then the objective's maps in time.

    Tokens are normalised, pass the hidden layers (each with norm and SiLU) and an output layer, and
    a linear skip is added. Where maps are interpolated between tokens (one for each frame, or with
    CogVideoX 1.5 for each latent frame) they pass a depthwise convolution over time.
    """

    def __init__(self, width: int, widths: Sequence[int], *, smooth: bool) -> None:
        """Build the layers.

        Args:
            width: channels of the transformer's tokens.
            widths: channels of the hidden layers and of the output.
            smooth: whether a convolution over time follows, as it should where maps are
                interpolated between tokens.
        """
        super().__init__()
        *hidden, out = widths
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        before = width
        for after in hidden:
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU()]
            before = after
        self.layers = nn.Sequential(*layers, nn.Linear(before, out))
        self.skip = nn.Linear(width, out, bias=False)
        self.smooth = TemporalConvolution(out) if smooth else None

    def forward(self, tokens_BJHWC: Tensor, time_weights_TJ: Tensor | None) -> Tensor:
        """Project tokens_BJHWC of the transformer's width: features_BTHWC of the last width.

        Args:
            tokens_BJHWC: of the tapped block.
            time_weights_TJ: `local_gram_flow.time_weights`: what each token in time gives to each
                map; None where tokens and maps correspond one for one.
        """
        normed_BJHWC = self.norm(tokens_BJHWC)
        features_BTHWC = self.layers(normed_BJHWC) + self.skip(normed_BJHWC)
        if time_weights_TJ is not None:
            weights_TJ = time_weights_TJ.to(features_BTHWC.dtype)
            features_BTHWC = torch.einsum("tj,bjhwc->bthwc", weights_TJ, features_BTHWC)
        return features_BTHWC if self.smooth is None else self.smooth(features_BTHWC)


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
