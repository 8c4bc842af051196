"""Projectors of REPA, VideoREPA and iREPA, in place of `Projector`: without norms and skips.

Legend: B clip, J token in time, T map of an objective, H W token grid, C channel, K tap of a 3x3
convolution.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from stages.train_student.model.student import Downsampler


class PublishedProjector(nn.Module):
    """An MLP or a convolution on the tapped tokens, then interpolation in time, then downsampling.

    In the order of VideoREPA (aHapBean/VideoREPA@8002687, cogvideox_t2v_align/lora_trainer.py).
    """

    def __init__(self, layers: nn.Module, downsampler: Downsampler | None = None) -> None:
        """Take the layers, from `mlp` or a `Convolution`."""
        super().__init__()
        self.layers = layers
        self.downsampler = downsampler

    def forward(self, tokens_BJHWC: Tensor, time_weights_TJ: Tensor | None) -> Tensor:
        """Project as `Projector.forward`: features_BTHWC of the layers' last width."""
        features_BTHWC: Tensor = self.layers(tokens_BJHWC)
        if time_weights_TJ is not None:
            weights_TJ = time_weights_TJ.to(features_BTHWC)
            features_BTHWC = torch.einsum("tj,bjhwc->bthwc", weights_TJ, features_BTHWC)
        return features_BTHWC if self.downsampler is None else self.downsampler(features_BTHWC)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with SiLU between them, as `build_mlp` of REPA (sihyun-yu/REPA@67f7145,
    models/sit.py).

    Args:
        widths: channels before the first and after each layer.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.SiLU()] * bool(layers) + [nn.Linear(before, after)]
    return nn.Sequential(*layers)


class Convolution(nn.Module):
    """3x3 convolution over each map's tokens, with zeros around them, as iREPA's projection.

    End2End-Diffusion/iREPA@99ad4ac, jit/projectors.py. Computed as one linear map whose outputs
    are shifted and added, since the gradient of a convolution is not deterministic on a GPU.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.taps = nn.Linear(before, 9 * after, bias=False)
        self.bias = nn.Parameter(torch.empty(after))
        # As torch draws a convolution's.
        bound = (9 * before) ** -0.5
        nn.init.uniform_(self.taps.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, tokens_BJHWC: Tensor) -> Tensor:
        """Convolve over H and W; keeps the grid."""
        height, width = tokens_BJHWC.shape[2:4]
        padded_BJHWC = F.pad(self.taps(tokens_BJHWC), (0, 0, 1, 1, 1, 1))
        taps_K = padded_BJHWC.chunk(9, dim=-1)
        shifted = (
            tap_BJHWC[:, :, row : row + height, column : column + width]
            for tap_BJHWC, (row, column) in zip(
                taps_K, ((row, column) for row in range(3) for column in range(3)), strict=True
            )
        )
        return self.bias + sum(shifted)
