"""Local Gram Flow: cosine similarity of each token to its neighbourhood in the next frame.

Legend: B clip, T frame, P frame pair (T-1), H W token grid, C channel, K neighbour.
A window of radius r holds K = (2r+1)^2 neighbours, row-major: (dy, dx) from (-r, -r) to (r, r).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

Kernel = Literal["torch", "triton"]
"""Implementation: matrix products in torch, on any device, or a fused Triton kernel."""

_SMALLEST_NORM = 1e-12


def local_gram_flow(features_BTHWC: Tensor, radius: int, *, kernel: Kernel = "torch") -> Tensor:
    """Cosine similarity of every token to its window in the next frame: s_t(p, d).

    Tokens are L2-normalised, and computation is in float32 (float64 for float64 input). Neighbours
    outside the grid are 0 and must be masked out (`neighbour_mask`).

    Args:
        features_BTHWC: features per clip, frame and token; any floating dtype, T >= 2.
        radius: half the window; 3 gives 7x7 tokens.
        kernel: `torch` or `triton`. `triton` applies to bfloat16 and float32 on CUDA; other inputs
            fall back to `torch`.

    Returns:
        similarities_BPHWK in [-1, 1], P = T - 1.

    Raises:
        ValueError: fewer than two frames, or a radius under 1.
        ImportError: `kernel` is `triton`, which is not installed.

    Source: Structure From Tracking, arXiv 2512.11792.
    """
    if features_BTHWC.ndim != 5 or features_BTHWC.shape[1] < 2:
        raise ValueError(
            "local_gram_flow needs features [clip, frame >= 2, height, width, channel], got shape "
            f"{tuple(features_BTHWC.shape)}"
        )
    if radius < 1:
        raise ValueError(f"radius must be >= 1, got {radius}; 3 gives a 7x7 window")
    similarities: Tensor
    if (
        kernel == "triton"
        and features_BTHWC.is_cuda
        and features_BTHWC.dtype in (torch.bfloat16, torch.float32)
    ):
        from stages.local_gram_flow.triton_cosines import TritonWindowCosines

        similarities = TritonWindowCosines.apply(features_BTHWC, radius, _SMALLEST_NORM)
        return similarities
    if features_BTHWC.dtype != torch.float64:
        features_BTHWC = features_BTHWC.float()
    similarities = _WindowCosines.apply(features_BTHWC, radius)
    return similarities


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


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast, so that products keep their operands' precision.

    A no-op on the meta device, which has no autocast.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _WindowCosines(torch.autograd.Function):
    """Cosines of each token with a window of the next map, one matrix product per window row.

    The product of a row of tokens with a padded row of keys contains every pair of the two rows;
    the window is a band of it. This costs W + 2r products per token and avoids a (2r+1)-fold copy
    of the features. The backward pass writes the gradient into the same band and multiplies again.
    All operands are views; only the unit tokens and their norms are saved for backward. A CPU
    processes one pair of frames at a time, to stay within its caches; a GPU all pairs of a clip, to
    be fully used.
    """

    @staticmethod
    def forward(ctx: Any, features_BTHWC: Tensor, radius: int) -> Tensor:
        # Like F.normalize, zero tokens stay zero.
        norm_BTHW1 = features_BTHWC.norm(dim=-1, keepdim=True).clamp_min_(_SMALLEST_NORM)
        unit_BTHWC = features_BTHWC / norm_BTHW1
        ctx.save_for_backward(unit_BTHWC, norm_BTHW1)
        ctx.radius = radius
        B, T, H, W, _ = unit_BTHWC.shape
        side = 2 * radius + 1
        out = unit_BTHWC.new_zeros(B, T - 1, H, W, side, side)
        with _no_autocast(features_BTHWC.device):
            for b, now, after in _groups(unit_BTHWC):
                keys_PHVC = _pad_sides(unit_BTHWC[b, after], radius)  # V = W + 2r
                for row, here, there in _rows(H, radius):
                    pairs = torch.matmul(unit_BTHWC[b, now, here], keys_PHVC[:, there].mT)
                    out[b, now, here, :, row] = _band(pairs, side)
        return out.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BPHWK: Tensor) -> tuple[Tensor, None]:
        unit_BTHWC, norm_BTHW1 = ctx.saved_tensors
        radius = ctx.radius
        B, _, H, W, _ = unit_BTHWC.shape
        side = 2 * radius + 1
        gradient = gradient_BPHWK.unflatten(-1, (side, side))
        grad_unit_BTHWC = torch.zeros_like(unit_BTHWC)
        with _no_autocast(unit_BTHWC.device):
            for b, now, after in _groups(unit_BTHWC):
                keys_PHVC = _pad_sides(unit_BTHWC[b, after], radius)
                grad_keys_PHVC = torch.zeros_like(keys_PHVC)
                for row, here, there in _rows(H, radius):
                    tokens = unit_BTHWC[b, now, here]
                    pairs = tokens.new_zeros(*tokens.shape[:3], W + 2 * radius)
                    _band(pairs, side).copy_(gradient[b, now, here, :, row])
                    grad_unit_BTHWC[b, now, here] += torch.matmul(pairs, keys_PHVC[:, there])
                    grad_keys_PHVC[:, there] += torch.matmul(pairs.mT, tokens)
                grad_unit_BTHWC[b, after] += grad_keys_PHVC[:, :, radius:-radius]
                # The gradient of `now` is complete: no later group uses these frames as keys.
                _through_norm(grad_unit_BTHWC[b, now], unit_BTHWC[b, now], norm_BTHW1[b, now])
            for b in range(B):
                _through_norm(grad_unit_BTHWC[b, -1], unit_BTHWC[b, -1], norm_BTHW1[b, -1])
        return grad_unit_BTHWC, None


def _groups(unit_BTHWC: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Groups of frame pairs to compute together: (clip, first frames, second frames)."""
    B, T = unit_BTHWC.shape[:2]
    pairs_per_group = T - 1 if unit_BTHWC.is_cuda else 1
    for b, t in product(range(B), range(0, T - 1, pairs_per_group)):
        yield b, slice(t, t + pairs_per_group), slice(t + 1, t + pairs_per_group + 1)


def _through_norm(gradient: Tensor, unit: Tensor, norm: Tensor) -> None:
    """Backpropagate from unit tokens [..., C] through the normalisation, in place."""
    along = torch.linalg.vecdot(gradient, unit)[..., None]
    gradient.addcmul_(unit, along, value=-1).div_(norm)


def _rows(height: int, radius: int) -> Iterator[tuple[int, slice, slice]]:
    """Window rows: (window row, token rows with a key there, the matching key rows)."""
    for row in range(2 * radius + 1):
        dy = row - radius
        first, last = max(0, -dy), min(height, height - dy)
        if first < last:
            yield row, slice(first, last), slice(first + dy, last + dy)


def _pad_sides(keys_PHWC: Tensor, radius: int) -> Tensor:
    return F.pad(keys_PHWC, (0, 0, radius, radius))


def _band(pairs: Tensor, side: int) -> Tensor:
    """View of columns w .. w + side - 1 of each row w: [P, H, W, W + 2r] -> [P, H, W, side]."""
    P, H, W, padded = pairs.shape
    return pairs.as_strided((P, H, W, side), (H * W * padded, W * padded, padded + 1, 1))


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
