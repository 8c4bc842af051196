"""Windows of neighbours: offsets, the mask of those inside the grid, and reversed frame pairs.

Legend: B clip, P frame pair, H W token grid, K neighbour.
A window of radius r holds K = (2r+1)^2 neighbours, row-major: (dy, dx) from (-r, -r) to (r, r).
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable


def neighbour_offsets(radius: int, device: torch.device | None = None) -> Tensor:
    """Offsets (dx, dy) in tokens of the K neighbours, in the order of the similarities: [K, 2]."""
    side = torch.arange(-radius, radius + 1, device=device)
    dy, dx = torch.meshgrid(side, side, indexing="ij")
    return torch.stack([dx.flatten(), dy.flatten()], dim=-1)


def neighbour_mask(
    height: int, width: int, radius: int, device: torch.device | None = None
) -> Tensor:
    """Mask of the neighbours that lie inside the grid: bool mask_HWK."""
    dx_K, dy_K = neighbour_offsets(radius, device).unbind(-1)
    y_HW1 = torch.arange(height, device=device)[:, None, None] + dy_K
    x_HW1 = torch.arange(width, device=device)[None, :, None] + dx_K
    return (y_HW1 >= 0) & (y_HW1 < height) & (x_HW1 >= 0) & (x_HW1 < width)


def radius_of_window(num_neighbours: int) -> int:
    """Radius r of a window of K = (2r+1)^2 neighbours.

    Raises:
        ValueError: K is not the square of an odd number >= 3.
    """
    side = round(num_neighbours**0.5)
    if side * side != num_neighbours or side % 2 == 0 or side < 3:
        raise ValueError(
            f"a window has (2r+1)^2 neighbours, such as 49 for radius 3; got {num_neighbours}"
        )
    return side // 2


def reverse_pairs(similarities_BPHWK: Tensor) -> Tensor:
    """Reverse the direction of each frame pair: from t -> t+1 to t+1 -> t, or back.

    <g_{t+1}(p), g_t(p+d)> = s_t(p+d, -d), so this only rearranges values. Differentiable.

    Args:
        similarities_BPHWK: output of `local_gram_flow`.

    Returns:
        similarities_BPHWK of each token of a pair's second frame to its window in the first;
        neighbours outside the grid are 0.

    Raises:
        ValueError: K is not a window size.
    """
    reversed_BPHWK: Tensor = _ReversedPairs.apply(similarities_BPHWK)
    return reversed_BPHWK


class _ReversedPairs(torch.autograd.Function):
    """`reverse_pairs` is a symmetric linear map, so its backward pass is the same function."""

    @staticmethod
    def forward(ctx: Any, similarities_BPHWK: Tensor) -> Tensor:
        return _reversed(similarities_BPHWK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BPHWK: Tensor) -> Tensor:
        return _reversed(gradient_BPHWK)


def _reversed(similarities_BPHWK: Tensor) -> Tensor:
    """For token (y, x) and window cell k = (i, j): the value at (y+i-r, x+j-r), cell K-1-k."""
    B, P, H, W, K = similarities_BPHWK.shape
    radius = radius_of_window(K)
    side = 2 * radius + 1
    padded = F.pad(similarities_BPHWK, (0, 0, *[radius] * 4)).contiguous()
    clip_stride, pair_stride, row_stride, token_stride, _ = padded.stride()
    window = padded.as_strided(
        (B, P, H, W, side, side),
        (clip_stride, pair_stride, row_stride, token_stride, row_stride - side, token_stride - 1),
        padded.storage_offset() + K - 1,
    )
    return window.flatten(-2)
