"""Window cosines and their gradient as Triton kernels for CUDA.

Needs triton, which comes with the CUDA builds of torch. Products are of the unnormalised features,
in bfloat16 or float32, accumulated in float32 and divided by the norms afterwards, so nothing is
rounded twice.

A program handles a tile of X tokens of one row and, for each window row, the V >= X + 2r keys
around it: their products are one small matrix, of which the window is a band.

Legend: B clip, T frame, P frame pair (T-1), H W token grid, C channel, K neighbour, X tokens of a
tile, V keys of a tile, D channels of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TOKENS = 32
_CHANNELS = 32


class TritonWindowCosines(torch.autograd.Function):
    """Similarities of features_BTHWC (bfloat16 or float32) to their windows, in float32."""

    @staticmethod
    def forward(ctx: Any, features_BTHWC: Tensor, radius: int, smallest_norm: float) -> Tensor:
        """similarities_BPHWK; norms are clamped to at least `smallest_norm`."""
        features_BTHWC = features_BTHWC.contiguous()
        norm_BTHW = torch.linalg.vector_norm(features_BTHWC, dim=-1, dtype=torch.float32)
        inverse_BTHW = norm_BTHW.clamp_(min=smallest_norm).reciprocal_()
        B, T, H, W, C = features_BTHWC.shape
        side = 2 * radius + 1
        out_BPHWK = inverse_BTHW.new_zeros(B, T - 1, H, W, side * side)
        tiles = triton.cdiv(W, _TOKENS)
        _cosines[(B * (T - 1) * H, tiles)](
            features_BTHWC,
            inverse_BTHW,
            out_BPHWK,
            T,
            H,
            W,
            C,
            RADIUS=radius,
            TOKENS=_TOKENS,
            KEYS=triton.next_power_of_2(_TOKENS + 2 * radius),
            CHANNELS=_CHANNELS,
            # bfloat16 converts to tf32 without loss.
            PRECISION="tf32" if features_BTHWC.dtype == torch.bfloat16 else "tf32x3",
        )
        ctx.save_for_backward(features_BTHWC, inverse_BTHW)
        ctx.radius = radius
        return out_BPHWK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BPHWK: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the features, in their dtype."""
        features_BTHWC, inverse_BTHW = ctx.saved_tensors
        B, T, H, W, C = features_BTHWC.shape
        grad_unit_BTHWC = torch.empty_like(features_BTHWC, dtype=torch.float32)
        grid = (B * T * H, triton.cdiv(W, _TOKENS), triton.cdiv(C, _CHANNELS))
        _gradients[grid](
            gradient_BPHWK.contiguous().float(),
            features_BTHWC,
            inverse_BTHW,
            grad_unit_BTHWC,
            T,
            H,
            W,
            C,
            RADIUS=ctx.radius,
            TOKENS=_TOKENS,
            KEYS=triton.next_power_of_2(_TOKENS + 2 * ctx.radius),
            CHANNELS=_CHANNELS,
        )
        # Through the norm: (g - u <u, g>) / norm.
        inverse_BTHW1 = inverse_BTHW[..., None]
        unit_BTHWC = features_BTHWC.float() * inverse_BTHW1
        along_BTHW1 = torch.linalg.vecdot(grad_unit_BTHWC, unit_BTHWC)[..., None]
        grad_unit_BTHWC.addcmul_(unit_BTHWC, along_BTHW1, value=-1).mul_(inverse_BTHW1)
        return grad_unit_BTHWC.to(features_BTHWC.dtype), None, None


@triton.jit
def _cosines(
    features,
    inverse_norms,
    out,
    T,
    H,
    W,
    C,
    RADIUS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Cosines of one tile of tokens of a frame pair with the keys of each window row."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    row = tl.program_id(0)
    y = row % H
    pair = row // H
    frame = pair // (T - 1) * T + pair % (T - 1)
    x_X = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x_V = tl.program_id(1) * TOKENS - RADIUS + tl.arange(0, KEYS)
    offset_XV = x_V[None, :] - x_X[:, None] + RADIUS
    in_band_XV = (offset_XV >= 0) & (offset_XV < SIDE)
    inside_XV = in_band_XV & (x_X < W)[:, None] & ((x_V >= 0) & (x_V < W))[None, :]
    token_X = ((frame * H + y) * W + x_X).to(tl.int64)
    token_scale_X = tl.load(inverse_norms + token_X, mask=x_X < W, other=0.0)
    out_X = (((pair * H + y) * W + x_X) * (SIDE * SIDE)).to(tl.int64)
    for window_row in range(SIDE):
        key_y = y + window_row - RADIUS
        if (key_y >= 0) & (key_y < H):
            is_key_V = (x_V >= 0) & (x_V < W)
            key_V = (((frame + 1) * H + key_y) * W + x_V).to(tl.int64)
            products_XV = tl.zeros((TOKENS, KEYS), tl.float32)
            for first in range(0, C, CHANNELS):
                c_D = first + tl.arange(0, CHANNELS)
                tokens_XD = tl.load(
                    features + token_X[:, None] * C + c_D[None, :],
                    mask=(x_X < W)[:, None] & (c_D < C)[None, :],
                    other=0.0,
                )
                keys_DV = tl.load(
                    features + key_V[None, :] * C + c_D[:, None],
                    mask=is_key_V[None, :] & (c_D < C)[:, None],
                    other=0.0,
                )
                products_XV = tl.dot(
                    tokens_XD.to(tl.float32),
                    keys_DV.to(tl.float32),
                    products_XV,
                    input_precision=PRECISION,
                )
            key_scale_V = tl.load(inverse_norms + key_V, mask=is_key_V, other=0.0)
            cosines_XV = products_XV * token_scale_X[:, None] * key_scale_V[None, :]
            index_XV = out_X[:, None] + window_row * SIDE + offset_XV
            tl.store(out + index_XV, cosines_XV, mask=inside_XV)


@triton.jit
def _gradients(
    gradients,
    features,
    inverse_norms,
    out,
    T,
    H,
    W,
    C,
    RADIUS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient of one tile of unit tokens: as tokens of their pair and keys of the previous one."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    row = tl.program_id(0)
    y = row % H
    frame = row // H
    t = frame % T
    pair = frame // T * (T - 1) + t
    x_X = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x_V = tl.program_id(1) * TOKENS - RADIUS + tl.arange(0, KEYS)
    c_D = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_other_V = (x_V >= 0) & (x_V < W)
    # Offset of the other token in this one's window, and of this one in the other's.
    offset_XV = x_V[None, :] - x_X[:, None] + RADIUS
    back_XV = SIDE - 1 - offset_XV
    inside_XV = (offset_XV >= 0) & (offset_XV < SIDE) & (x_X < W)[:, None] & is_other_V[None, :]
    sum_XD = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for window_row in range(SIDE):
        other_y = y + window_row - RADIUS
        if (other_y >= 0) & (other_y < H):
            if t < T - 1:
                index_XV = ((pair * H + y) * W + x_X)[:, None] * (SIDE * SIDE) + (
                    window_row * SIDE + offset_XV
                )
                sum_XD = _add_others(
                    sum_XD,
                    tl.load(gradients + index_XV.to(tl.int64), mask=inside_XV, other=0.0),
                    features,
                    inverse_norms,
                    ((frame + 1) * H + other_y) * W + x_V,
                    is_other_V,
                    c_D,
                    C,
                )
            if t > 0:
                back_row = SIDE - 1 - window_row
                index_XV = (((pair - 1) * H + other_y) * W + x_V)[None, :] * (SIDE * SIDE) + (
                    back_row * SIDE + back_XV
                )
                sum_XD = _add_others(
                    sum_XD,
                    tl.load(gradients + index_XV.to(tl.int64), mask=inside_XV, other=0.0),
                    features,
                    inverse_norms,
                    ((frame - 1) * H + other_y) * W + x_V,
                    is_other_V,
                    c_D,
                    C,
                )
    token_X = ((frame * H + y) * W + x_X).to(tl.int64)
    inside_XD = (x_X < W)[:, None] & (c_D < C)[None, :]
    tl.store(out + token_X[:, None] * C + c_D[None, :], sum_XD, mask=inside_XD)


@triton.jit
def _add_others(sum_XD, weights_XV, features, inverse_norms, other_V, is_other_V, c_D, C):
    """Add a row's weighted unit tokens; tf32x3 matches float32 accuracy."""
    other_V = other_V.to(tl.int64)
    weights_XV *= tl.load(inverse_norms + other_V, mask=is_other_V, other=0.0)[None, :]
    others_VD = tl.load(
        features + other_V[:, None] * C + c_D[None, :],
        mask=is_other_V[:, None] & (c_D < C)[None, :],
        other=0.0,
    )
    return tl.dot(weights_XV, others_VD.to(tl.float32), sum_XD, input_precision="tf32x3")
