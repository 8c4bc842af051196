"""Projector heads: from the student's tokens to the features that an objective compares.

Legend: B clip, J token in time, T map of the objective, H W token grid, C channel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Per-token MLP with a linear skip, followed by interpolation in time to the objective's maps.

    Tokens are normalised, pass the hidden layers (each with norm and SiLU) and an output layer, and
    a linear skip is added. Maps that are interpolated between tokens (one per frame, or with
    CogVideoX 1.5 one per latent frame) pass a depthwise convolution over time.
    """

    def __init__(self, width: int, widths: Sequence[int], *, smooth: bool) -> None:
        """Build the layers.

        Args:
            width: channels of the transformer's tokens.
            widths: channels of the hidden layers and of the output.
            smooth: add a convolution over time, for maps that are interpolated between tokens.
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
            tokens_BJHWC: output of the tapped block.
            time_weights_TJ: interpolation weights of `local_gram_flow.time_weights`; None if tokens
                and maps correspond one to one.
        """
        normed_BJHWC = self.norm(tokens_BJHWC)
        features_BTHWC = self.layers(normed_BJHWC) + self.skip(normed_BJHWC)
        if time_weights_TJ is not None:
            weights_TJ = time_weights_TJ.to(features_BTHWC.dtype)
            features_BTHWC = torch.einsum("tj,bjhwc->bthwc", weights_TJ, features_BTHWC)
        return features_BTHWC if self.smooth is None else self.smooth(features_BTHWC)


class TemporalConvolution(nn.Module):
    """Depthwise 3-tap convolution over time, initialised to the identity, with edge padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps_3C = torch.zeros(3, channels)
        taps_3C[1] = 1.0
        self.taps_3C = nn.Parameter(taps_3C)

    def forward(self, features_BTHWC: Tensor) -> Tensor:
        """Convolve over T; keeps the shape."""
        before = torch.cat([features_BTHWC[:, :1], features_BTHWC[:, :-1]], dim=1)
        after = torch.cat([features_BTHWC[:, 1:], features_BTHWC[:, -1:]], dim=1)
        taps = self.taps_3C
        return taps[0] * before + taps[1] * features_BTHWC + taps[2] * after
