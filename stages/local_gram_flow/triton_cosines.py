"""The window's cosines as a Triton kernel for CUDA, and their gradient; `similarities` calls it.

Needs triton, which comes with the CUDA builds of torch. Products are of the features as they are
given, in bfloat16 or float32, and are summed in float32; norms divide afterwards, so that nothing
is rounded twice.

A program holds a run of X tokens of one row and, row by row of the window, the run of keys beside
it, V >= X + 2r wide: their products are one small matrix, of which the window is a band.

Legend: B clip, T frame, P frame pair (T-1), H W token grid, C channel, K neighbour, X tokens of a
run, V keys of a run, D channels of a run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_RUN = 32
_CHANNELS = 32


class TritonWindowCosines(torch.autograd.Function):
    """Similarities of features_BTHWC (bfloat16 or float32) to their windows, in float32."""

    @staticmethod
    def forward(ctx: Any, features_BTHWC: Tensor, radius: int, smallest_norm: float) -> Tensor:
        """Similarities_BPHWK; norms under `smallest_norm` count as that."""
        features_BTHWC = features_BTHWC.contiguous()
        norm_BTHW = torch.linalg.vector_norm(features_BTHWC, dim=-1, dtype=torch.float32)
        inverse_BTHW = norm_BTHW.clamp_(min=smallest_norm).reciprocal_()
        B, T, H, W, C = features_BTHWC.shape
        side = 2 * radius + 1
        out_BPHWK = inverse_BTHW.new_zeros(B, T - 1, H, W, side * side)
        runs = triton.cdiv(W, _RUN)
        _cosines[(B * (T - 1) * H, runs)](
            features_BTHWC,
            inverse_BTHW,
            out_BPHWK,
            T,
            H,
            W,
            C,
            RADIUS=radius,
            RUN=_RUN,
            KEYS=triton.next_power_of_2(_RUN + 2 * radius),
            CHANNELS=_CHANNELS,
            # A bfloat16 is a tf32 without loss.
            PRECISION="tf32" if features_BTHWC.dtype == torch.bfloat16 else "tf32x3",
        )
        ctx.save_for_backward(features_BTHWC, inverse_BTHW)
        ctx.radius = radius
        return out_BPHWK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BPHWK: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the features, in their format."""
        features_BTHWC, inverse_BTHW = ctx.saved_tensors
        B, T, H, W, C = features_BTHWC.shape
        of_unit_BTHWC = torch.empty_like(features_BTHWC, dtype=torch.float32)
        grid = (B * T * H, triton.cdiv(W, _RUN), triton.cdiv(C, _CHANNELS))
        _gradients[grid](
            gradient_BPHWK.contiguous().float(),
            features_BTHWC,
            inverse_BTHW,
            of_unit_BTHWC,
            T,
            H,
            W,
            C,
            RADIUS=ctx.radius,
            RUN=_RUN,
            KEYS=triton.next_power_of_2(_RUN + 2 * ctx.radius),
            CHANNELS=_CHANNELS,
        )
        # Through the norm: (g - u <u, g>) / norm.
        inverse_BTHW1 = inverse_BTHW[..., None]
        unit_BTHWC = features_BTHWC.float() * inverse_BTHW1
        along_BTHW1 = torch.linalg.vecdot(of_unit_BTHWC, unit_BTHWC)[..., None]
        of_unit_BTHWC.addcmul_(unit_BTHWC, along_BTHW1, value=-1).mul_(inverse_BTHW1)
        return of_unit_BTHWC.to(features_BTHWC.dtype), None, None


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
    RUN: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of tokens of a frame pair: products with the window's rows, over both norms."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    row = tl.program_id(0)
    y = row % H
    pair = row // H
    frame = pair // (T - 1) * T + pair % (T - 1)
    x_X = tl.program_id(1) * RUN + tl.arange(0, RUN)
    x_V = tl.program_id(1) * RUN - RADIUS + tl.arange(0, KEYS)
    offset_XV = x_V[None, :] - x_X[:, None] + RADIUS
    in_band_XV = (offset_XV >= 0) & (offset_XV < SIDE)
    inside_XV = in_band_XV & (x_X < W)[:, None] & ((x_V >= 0) & (x_V < W))[None, :]
    token_X = ((frame * H + y) * W + x_X).to(tl.int64)
    of_tokens_X = tl.load(inverse_norms + token_X, mask=x_X < W, other=0.0)
    out_X = (((pair * H + y) * W + x_X) * (SIDE * SIDE)).to(tl.int64)
    for window_row in range(SIDE):
        key_y = y + window_row - RADIUS
        if (key_y >= 0) & (key_y < H):
            is_key_V = (x_V >= 0) & (x_V < W)
            key_V = (((frame + 1) * H + key_y) * W + x_V).to(tl.int64)
            products_XV = tl.zeros((RUN, KEYS), tl.float32)
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
            of_keys_V = tl.load(inverse_norms + key_V, mask=is_key_V, other=0.0)
            cosines_XV = products_XV * of_tokens_X[:, None] * of_keys_V[None, :]
            place_XV = out_X[:, None] + window_row * SIDE + offset_XV
            tl.store(out + place_XV, cosines_XV, mask=inside_XV)


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
    RUN: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient of one run of unit tokens: as tokens of the next pair, as keys of the one before."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    row = tl.program_id(0)
    y = row % H
    frame = row // H
    t = frame % T
    pair = frame // T * (T - 1) + t
    x_X = tl.program_id(1) * RUN + tl.arange(0, RUN)
    x_V = tl.program_id(1) * RUN - RADIUS + tl.arange(0, KEYS)
    c_D = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_other_V = (x_V >= 0) & (x_V < W)
    # Of the other token as this one's neighbour, and of this one as the other's.
    offset_XV = x_V[None, :] - x_X[:, None] + RADIUS
    back_XV = SIDE - 1 - offset_XV
    inside_XV = (offset_XV >= 0) & (offset_XV < SIDE) & (x_X < W)[:, None] & is_other_V[None, :]
    sum_XD = tl.zeros((RUN, CHANNELS), tl.float32)
    for window_row in range(SIDE):
        other_y = y + window_row - RADIUS
        if (other_y >= 0) & (other_y < H):
            if t < T - 1:
                place_XV = ((pair * H + y) * W + x_X)[:, None] * (SIDE * SIDE) + (
                    window_row * SIDE + offset_XV
                )
                sum_XD = _add_others(
                    sum_XD,
                    tl.load(gradients + place_XV.to(tl.int64), mask=inside_XV, other=0.0),
                    features,
                    inverse_norms,
                    ((frame + 1) * H + other_y) * W + x_V,
                    is_other_V,
                    c_D,
                    C,
                )
            if t > 0:
                back_row = SIDE - 1 - window_row
                place_XV = (((pair - 1) * H + other_y) * W + x_V)[None, :] * (SIDE * SIDE) + (
                    back_row * SIDE + back_XV
                )
                sum_XD = _add_others(
                    sum_XD,
                    tl.load(gradients + place_XV.to(tl.int64), mask=inside_XV, other=0.0),
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
    """Add the unit tokens of a row, weighted; three products of tf32 are as good as float32."""
    other_V = other_V.to(tl.int64)
    weights_XV *= tl.load(inverse_norms + other_V, mask=is_other_V, other=0.0)[None, :]
    others_VD = tl.load(
        features + other_V[:, None] * C + c_D[None, :],
        mask=is_other_V[:, None] & (c_D < C)[None, :],
        other=0.0,
    )
    return tl.dot(weights_XV, others_VD.to(tl.float32), sum_XD, input_precision="tf32x3")
