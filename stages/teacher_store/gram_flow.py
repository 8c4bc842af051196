"""The Gram flow as a store holds it: float16, or uint8 with a range for each token's window.

Legend: T map of the teacher, P pair of maps (T-1), H W token grid, G fused channel, K neighbour.
Everything that takes a flow takes it with any leading axes.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cache_schema import ArraySpec
from stages.local_gram_flow import (
    local_gram_flow,
    neighbour_mask,
    radius_of_window,
    regrid_fused,
)
from stages.teacher_store.config import FlowDtype as FlowDtype
from stages.teacher_store.config import StoredPairs
from stages.teacher_store.features import round_down_to_float16, round_up_to_float16

FLOAT16_STEP = 2.0**-10
"""A float16 flow holds multiples of this, each of them exactly.

At temperature tau this adds step^2 / (24 tau^2) nats to the KL divergence, to second order: 4e-6 at
0.1, whatever the similarities are. float16's own steps are finer where similarities are small,
which no softmax sees, and which would not compress."""
_UINT8_MAX = 255
Value = TypeVar("Value")

_BACK = "_back"
"""Ends the names of the arrays of a crossed flow's second half."""


def flow_arrays_spec(
    pairs: int,
    height: int,
    width: int,
    radius: int,
    dtype: FlowDtype,
    *,
    stored: StoredPairs = "forward",
) -> dict[str, ArraySpec]:
    """What a store holds of each clip's Gram flow.

    float16: `gram_flow`, compressed. uint8: `gram_flow`, and `low` and `step`, float16 for each
    token. Crossed: the same once more, the names ending in `_back`. `valid` is the store's own.
    """
    one_direction = _one_direction_spec(pairs, height, width, radius, dtype)
    return one_direction if stored == "forward" else one_direction | with_back_suffix(one_direction)


def with_back_suffix(arrays: Mapping[str, Value]) -> dict[str, Value]:
    """The names that a crossed flow's arrays from each map to the one before are stored under."""
    return {name + _BACK: value for name, value in arrays.items()}


def back_arrays(arrays: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Those arrays under their plain names, as `decode_gram_flow` takes them; None of a flow that
    is not crossed."""
    found = {name.removesuffix(_BACK): a for name, a in arrays.items() if name.endswith(_BACK)}
    return found or None


def _one_direction_spec(
    pairs: int, height: int, width: int, radius: int, dtype: FlowDtype
) -> dict[str, ArraySpec]:
    axes = ("p", "h", "w", "k")
    shape = (pairs, height, width, (2 * radius + 1) ** 2)
    if dtype == "float16":
        flow = ArraySpec(
            dtype=dtype, shape=shape, dimension_names=axes, compression="blosc-zstd-shuffle"
        )
        return {"gram_flow": flow}
    bound = ArraySpec(dtype="float16", shape=shape[:3], dimension_names=axes[:3])
    flow = ArraySpec(dtype=dtype, shape=shape, dimension_names=axes)
    return {"gram_flow": flow, "low": bound, "step": bound}


@torch.no_grad()
def gram_flow_of(
    features_THWG: Tensor,
    *,
    radius: int,
    token_grid: tuple[int, int],
    native_parts: int | None = None,
    norm_P: Tensor | None = None,
) -> Tensor:
    """The similarities a clip's stored features imply, on the student's token grid.

    Args:
        features_THWG: as `decode_features` returns them.
        radius: half the window.
        token_grid: rows and columns of the student's tokens.
        native_parts: the features' `parts` where they lie on SAM2's own grid and are resampled;
            None where they lie on the student's.
        norm_P: of the parts over the clip, where these are some of its maps; see `regrid_fused`.

    Returns:
        flow_PHWK, float32 (float64 if given it); neighbours outside the grid hold 0.

    Raises:
        ValueError: The features lie on another grid, or are of fewer than two maps.
    """
    if native_parts is not None:
        features_THWG = regrid_fused(features_THWG, *token_grid, native_parts, norm_P=norm_P)
    T, H, W, _ = features_THWG.shape
    if token_grid != (H, W):
        raise ValueError(f"features lie on a grid of {(H, W)} tokens, not {token_grid}")
    if T < 2:
        raise ValueError(f"a Gram flow needs two maps or more, got {T}")
    return local_gram_flow(features_THWG[None], radius)[0]


@torch.no_grad()
def encode_gram_flow(flow_PHWK: Tensor, dtype: FlowDtype) -> dict[str, np.ndarray]:
    """The arrays of a clip's Gram flow, on the host.

    float16 holds the nearest multiple of `FLOAT16_STEP`: off by half of it at most.

    uint8 holds (value - low) / step, rounded, where low and step are those of a token's neighbours
    inside the grid: the lowest value rounded down to float16, and the rest of the range over 255
    rounded up. What `decode_gram_flow` returns is off by half a step at most; a window whose values
    are all one float16 number is exact.
    """
    if dtype == "float16":
        steps_PHWK = (flow_PHWK.float() / FLOAT16_STEP).round()
        return {"gram_flow": _on_host((steps_PHWK * FLOAT16_STEP).to(torch.float16))}
    flow_PHWK = flow_PHWK.float()
    inside_HWK = _inside(flow_PHWK)
    min_PHW = flow_PHWK.masked_fill(~inside_HWK, torch.inf).amin(dim=-1)
    max_PHW = flow_PHWK.masked_fill(~inside_HWK, -torch.inf).amax(dim=-1)
    low_PHW = round_down_to_float16(min_PHW)
    step_PHW = round_up_to_float16((max_PHW - low_PHW.float()) / _UINT8_MAX)
    divisor_PHW1 = torch.where(step_PHW > 0, step_PHW.float(), 1.0)[..., None]
    codes_PHWK = ((flow_PHWK - low_PHW.float()[..., None]) / divisor_PHW1).round()
    codes_PHWK = codes_PHWK.masked_fill(~inside_HWK, 0.0).to(torch.uint8)
    return {
        "gram_flow": _on_host(codes_PHWK),
        "low": _on_host(low_PHW),
        "step": _on_host(step_PHW),
    }


def decode_gram_flow(arrays: Mapping[str, Tensor]) -> Tensor:
    """The Gram flow of a clip or a batch, float32 [..., P, H, W, K], on the arrays' device.

    Args:
        arrays: as they were stored; with any leading axes, and of any number of pairs.
    """
    flow = arrays["gram_flow"].float()
    if "step" not in arrays:
        return flow
    flow = flow * arrays["step"].float()[..., None] + arrays["low"].float()[..., None]
    return flow.masked_fill(~_inside(flow), 0.0)


def narrow_window(flow_PHWK: Tensor, radius_stored: int, radius_wanted: int) -> Tensor:
    """The Gram flow of a smaller window: the middle of the one that is stored.

    Raises:
        ValueError: The wanted window is larger, or K is not that of the stored one.
    """
    if radius_of_window(flow_PHWK.shape[-1]) != radius_stored:
        raise ValueError(
            f"{flow_PHWK.shape[-1]} neighbours are no window of radius {radius_stored}"
        )
    if not 1 <= radius_wanted <= radius_stored:
        raise ValueError(
            f"a Gram flow of radius {radius_stored} holds the windows of radius 1 to "
            f"{radius_stored}, not {radius_wanted}"
        )
    side = 2 * radius_stored + 1
    middle = slice(radius_stored - radius_wanted, radius_stored + radius_wanted + 1)
    window = flow_PHWK.unflatten(-1, (side, side))[..., middle, middle]
    return window.flatten(-2)


def _inside(flow_PHWK: Tensor) -> Tensor:
    """Which neighbours lie inside the grid: bool [H, W, K]."""
    H, W, K = flow_PHWK.shape[-3:]
    return neighbour_mask(H, W, radius_of_window(K), flow_PHWK.device)


def _on_host(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.cpu().numpy())
