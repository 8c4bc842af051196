"""Local Gram Flow: cosine similarity of each token to its neighbourhood in the next frame.

Legend: B clip, T frame, P frame pair (T-1), H W token grid, Y X the same with r zeros on each side,
C channel, V keys of a row of tokens, K neighbour (`windows`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.local_gram_flow.windows import reverse_pairs

Kernel = Literal["torch", "triton"]
"""Implementation: matrix products in torch, on any device, or a fused Triton kernel."""

_SMALLEST_NORM = 1e-12
_PAIRS = 2
"""Pairs of maps that a CPU pads and copies together; more would take more memory than they save
time."""


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
    on_cpu = features_BTHWC.device.type == "cpu"
    similarities = (_PairCosines if on_cpu else _ClipCosines).apply(features_BTHWC, radius)
    return similarities


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast, so that products keep their operands' precision.

    A no-op on the meta device, which has no autocast.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _ClipCosines(torch.autograd.Function):
    """Cosines of each token with a window of the next map, one matrix product per window row.

    The product of a row of tokens with a padded row of keys contains every pair of the two rows;
    the window is a band of it. This costs W + 2r products per token and avoids a (2r+1)-fold copy
    of the features. The backward pass writes the gradient into the same band and multiplies again.
    Only the unit tokens and their norms are saved for backward. A product takes all pairs of a
    clip, so that a GPU is fully used.
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
            for b in range(B):
                keys_PHVC = F.pad(unit_BTHWC[b, 1:], (0, 0, radius, radius))  # V = W + 2r
                for row, here, there in _rows(H, radius):
                    pairs = torch.matmul(unit_BTHWC[b, :-1, here], keys_PHVC[:, there].mT)
                    out[b, :, here, :, row] = _row_band(pairs, side)
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
            for b in range(B):
                keys_PHVC = F.pad(unit_BTHWC[b, 1:], (0, 0, radius, radius))
                grad_keys_PHVC = torch.zeros_like(keys_PHVC)
                for row, here, there in _rows(H, radius):
                    tokens = unit_BTHWC[b, :-1, here]
                    pairs = tokens.new_zeros(*tokens.shape[:3], W + 2 * radius)
                    _row_band(pairs, side).copy_(gradient[b, :, here, :, row])
                    grad_unit_BTHWC[b, :-1, here] += torch.matmul(pairs, keys_PHVC[:, there])
                    grad_keys_PHVC[:, there] += torch.matmul(pairs.mT, tokens)
                grad_unit_BTHWC[b, 1:] += grad_keys_PHVC[:, :, radius:-radius]
                _through_norm(grad_unit_BTHWC[b], unit_BTHWC[b], norm_BTHW1[b])
        return grad_unit_BTHWC, None


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


def _row_band(pairs: Tensor, side: int) -> Tensor:
    """View of columns w .. w + side - 1 of each row w: [P, H, W, W + 2r] -> [P, H, W, side]."""
    P, H, W, padded = pairs.shape
    return pairs.as_strided((P, H, W, side), (H * W * padded, W * padded, padded + 1, 1))


class _PairCosines(torch.autograd.Function):
    """The same, one matrix product per pair of maps.

    The product of each row of tokens with the 2r + 1 padded rows of keys around it: the window is
    a band in each of them. Every operation on several threads ends with a wait for the last thread,
    which on a busy CPU may not be running: few large products make an eighth of the waits of a
    product per window row. `_PAIRS` at a time are padded and copied together, which saves further
    waits. Only the norms are saved for backward beside the features.
    """

    @staticmethod
    def forward(ctx: Any, features_BTHWC: Tensor, radius: int) -> Tensor:
        norm_BTHW1 = features_BTHWC.norm(dim=-1, keepdim=True).clamp_min_(_SMALLEST_NORM)
        ctx.save_for_backward(features_BTHWC, norm_BTHW1)
        ctx.radius = radius
        B, T, H, W, _ = features_BTHWC.shape
        side = 2 * radius + 1
        out = features_BTHWC.new_empty(B, T - 1, H, W, side, side)
        unit_TYXC, pairs_PHWV = _buffers(features_BTHWC, radius)
        inside_THWC = unit_TYXC[:, radius:-radius, radius:-radius]
        with _no_autocast(features_BTHWC.device):
            for b, first in product(range(B), range(0, T - 1, _PAIRS)):
                P = min(_PAIRS, T - 1 - first)
                maps = slice(first, first + P + 1)
                torch.div(features_BTHWC[b, maps], norm_BTHW1[b, maps], out=inside_THWC[: P + 1])
                for p in range(P):
                    keys_HVC = _key_rows(unit_TYXC[p + 1], side)
                    torch.bmm(inside_THWC[p], keys_HVC.mT, out=pairs_PHWV[p])
                out[b, first : first + P] = _band(pairs_PHWV[:P], side)
        return out.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BPHWK: Tensor) -> tuple[Tensor, None]:
        features_BTHWC, norm_BTHW1 = ctx.saved_tensors
        with _no_autocast(features_BTHWC.device):
            grad_BTHWC = _unit_gradient(gradient_BPHWK, features_BTHWC, norm_BTHW1, ctx.radius)
        # Through the normalisation: a change along a token does not change its unit token.
        along_BTHW1 = torch.linalg.vecdot(grad_BTHWC, features_BTHWC)[..., None]
        along_BTHW1 /= norm_BTHW1.square()
        return grad_BTHWC.addcmul_(features_BTHWC, along_BTHW1, value=-1).div_(norm_BTHW1), None


def _unit_gradient(
    gradient_BPHWK: Tensor, features_BTHWC: Tensor, norm_BTHW1: Tensor, radius: int
) -> Tensor:
    """Gradient of the unit tokens, which are the tokens of one pair and the keys of another."""
    B, T, _, _, _ = features_BTHWC.shape
    side = 2 * radius + 1
    forth = gradient_BPHWK.unflatten(-1, (side, side))
    back = reverse_pairs(gradient_BPHWK).unflatten(-1, (side, side))
    grad_BTHWC = features_BTHWC.new_zeros(features_BTHWC.shape)
    unit_TYXC, pairs_PHWV = _buffers(features_BTHWC, radius)
    inside_THWC = unit_TYXC[:, radius:-radius, radius:-radius]
    for b, first in product(range(B), range(0, T - 1, _PAIRS)):
        P = min(_PAIRS, T - 1 - first)
        maps = slice(first, first + P + 1)
        torch.div(features_BTHWC[b, maps], norm_BTHW1[b, maps], out=inside_THWC[: P + 1])
        band = _band(pairs_PHWV[:P], side)  # the rest stays 0
        band.copy_(forth[b, first : first + P])
        for p in range(P):
            keys_HVC = _key_rows(unit_TYXC[p + 1], side)
            grad_BTHWC[b, first + p].baddbmm_(pairs_PHWV[p], keys_HVC)
        band.copy_(back[b, first : first + P])
        for p in range(P):
            keys_HVC = _key_rows(unit_TYXC[p], side)
            grad_BTHWC[b, first + p + 1].baddbmm_(pairs_PHWV[p], keys_HVC)
    return grad_BTHWC


def _buffers(features_BTHWC: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Zeros for the padded unit tokens of `_PAIRS` pairs, and for products of tokens and keys."""
    _, T, H, W, C = features_BTHWC.shape
    P, Y, X = min(_PAIRS, T - 1), H + 2 * radius, W + 2 * radius
    unit_TYXC = features_BTHWC.new_zeros(P + 1, Y, X, C)
    pairs_PHWV = features_BTHWC.new_zeros(P, H, W, (2 * radius + 1) * X)
    return unit_TYXC, pairs_PHWV


def _key_rows(padded_YXC: Tensor, side: int) -> Tensor:
    """View of the keys of each row's windows: [H, V = side * X, C], rows overlap."""
    Y, X, C = padded_YXC.shape
    return padded_YXC.as_strided(
        (Y - side + 1, side * X, C), (X * C, C, 1), padded_YXC.storage_offset()
    )


def _band(pairs_PHWV: Tensor, side: int) -> Tensor:
    """View of keys w .. w + side - 1 in each of the rows of V: [P, H, W, side, side]."""
    P, H, W, V = pairs_PHWV.shape
    return pairs_PHWV.as_strided((P, H, W, side, side), (H * W * V, W * V, V + 1, V // side, 1))
