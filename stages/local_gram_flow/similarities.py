"""Local Gram Flow: how alike each token is to its neighbourhood in the next frame.

Legend: B clip, T frame, P frame pair (T-1), H W token grid, C channel, K neighbour, N = B * P.
A window of radius r holds K = (2r+1)^2 neighbours, row-major: (dy, dx) from (-r, -r) to (r, r).
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def local_gram_flow(features_BTHWC: Tensor, radius: int) -> Tensor:
    """Cosine similarity of every token to its window in the next frame: s_t(p, d).

    Tokens are L2-normalised here, and everything is computed in float32 (float64 if given it).
    Neighbours outside the grid hold 0; they must be masked out (`neighbour_mask`), never used.

    Args:
        features_BTHWC: features per clip, frame and token; any floating dtype, T >= 2.
        radius: half the window; 3 gives the paper's 7x7.

    Returns:
        similarities_BPHWK in [-1, 1], P = T - 1.

    Raises:
        ValueError: fewer than two frames, or a radius under 1.

    Source: Structure From Tracking, arXiv 2512.11792.
    """
    if features_BTHWC.ndim != 5 or features_BTHWC.shape[1] < 2:
        raise ValueError(
            "local_gram_flow needs features [clip, frame >= 2, height, width, channel], got shape "
            f"{tuple(features_BTHWC.shape)}"
        )
    if radius < 1:
        raise ValueError(f"radius must be >= 1, got {radius}; 3 gives the paper's 7x7 window")
    if features_BTHWC.dtype != torch.float64:
        features_BTHWC = features_BTHWC.float()
    unit_BTHWC = F.normalize(features_BTHWC, dim=-1)
    B, T, H, W, C = unit_BTHWC.shape
    current_NHWC = unit_BTHWC[:, :-1].reshape(B * (T - 1), H, W, C)
    following_NHWC = unit_BTHWC[:, 1:].reshape(B * (T - 1), H, W, C)
    similarities_NHWK = _WindowProducts.apply(current_NHWC, following_NHWC, radius)
    return similarities_NHWK.view(B, T - 1, H, W, (2 * radius + 1) ** 2)


def neighbour_offsets(radius: int, device: torch.device | None = None) -> Tensor:
    """Offsets (dx, dy) in tokens of the K neighbours, in the order of the similarities: [K, 2]."""
    side = torch.arange(-radius, radius + 1, device=device)
    dy, dx = torch.meshgrid(side, side, indexing="ij")
    return torch.stack([dx.flatten(), dy.flatten()], dim=-1)


def neighbour_mask(
    height: int, width: int, radius: int, device: torch.device | None = None
) -> Tensor:
    """Which neighbours lie inside the grid: bool mask_HWK."""
    dx_K, dy_K = neighbour_offsets(radius, device).unbind(-1)
    y_HW1 = torch.arange(height, device=device)[:, None, None] + dy_K
    x_HW1 = torch.arange(width, device=device)[None, :, None] + dx_K
    return (y_HW1 >= 0) & (y_HW1 < height) & (x_HW1 >= 0) & (x_HW1 < width)


def radius_of_window(num_neighbours: int) -> int:
    """Radius r of a window of K = (2r+1)^2 neighbours.

    Raises:
        ValueError: K is no odd square.
    """
    side = round(num_neighbours**0.5)
    if side * side != num_neighbours or side % 2 == 0 or side < 3:
        raise ValueError(
            f"a window has (2r+1)^2 neighbours, such as 49 for radius 3; got {num_neighbours}"
        )
    return side // 2


class _WindowProducts(torch.autograd.Function):
    """Dot products of each token with a window of another map, one matrix product per window row.

    A row of tokens times the padded row of keys gives every pair in two rows, of which the window
    is a band: W + 2r products per token instead of a (2r+1)-fold copy of the features. The backward
    pass writes the gradient into the same band and multiplies again, so that nothing but the inputs
    is kept in between.
    """

    @staticmethod
    def forward(ctx: Any, queries_NHWC: Tensor, keys_NHWC: Tensor, radius: int) -> Tensor:
        ctx.save_for_backward(queries_NHWC, keys_NHWC)
        ctx.radius = radius
        N, H, W, _ = queries_NHWC.shape
        side = 2 * radius + 1
        keys_padded = _pad(keys_NHWC, radius)
        out = queries_NHWC.new_empty(N, H, W, side, side)
        with torch.autocast(queries_NHWC.device.type, enabled=False):
            for row in range(side):
                # [N, H, W, C] x [N, H, C, W + 2r]
                pairs = torch.matmul(queries_NHWC, keys_padded[:, row : row + H].transpose(-1, -2))
                out[..., row, :] = _band(pairs, side)
        return out.view(N, H, W, side * side)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        queries_NHWC, keys_NHWC = ctx.saved_tensors
        radius = ctx.radius
        N, H, W, _ = queries_NHWC.shape
        side = 2 * radius + 1
        gradient = gradients[0].reshape(N, H, W, side, side)
        keys_padded = _pad(keys_NHWC, radius)
        queries_gradient = torch.zeros_like(queries_NHWC)
        keys_gradient = torch.zeros_like(keys_padded)
        pairs = queries_NHWC.new_zeros(N, H, W, W + 2 * radius)
        band = _band(pairs, side)
        with torch.autocast(queries_NHWC.device.type, enabled=False):
            for row in range(side):
                band.copy_(gradient[..., row, :])  # the rest of `pairs` stays zero
                queries_gradient += torch.matmul(pairs, keys_padded[:, row : row + H])
                keys_gradient[:, row : row + H] += torch.matmul(
                    pairs.transpose(-1, -2), queries_NHWC
                )
        inner = slice(radius, -radius)
        return queries_gradient, keys_gradient[:, inner, inner], None


def _pad(keys_NHWC: Tensor, radius: int) -> Tensor:
    return F.pad(keys_NHWC, (0, 0, radius, radius, radius, radius))


def _band(pairs: Tensor, side: int) -> Tensor:
    """View of columns w .. w + side - 1 of each row w: [N, H, W, side] of [N, H, W, W + 2r]."""
    N, H, W, padded = pairs.shape
    return pairs.as_strided((N, H, W, side), (H * W * padded, W * padded, padded + 1, 1))
