"""Storage encoding of Gram flows: float16, or uint8 with a range per token's window.

Legend: T map of the teacher, P pair of maps (T-1), H W token grid, G fused channel, K neighbour.
Functions that take a flow accept any leading axes.
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
"""Values of a float16 flow are rounded to multiples of this; float16 represents each exactly.

At temperature tau this adds step^2 / (24 tau^2) nats to the KL divergence, to second order: 4e-6 at
0.1, whatever the similarities are. float16's own finer steps near 0 make no difference to a softmax
and would not compress."""
_UINT8_MAX = 255
Value = TypeVar("Value")

_BACK = "_back"
"""Suffix of array names of a crossed flow's second half."""


def flow_arrays_spec(
    pairs: int,
    height: int,
    width: int,
    radius: int,
    dtype: FlowDtype,
    *,
    stored: StoredPairs = "forward",
) -> dict[str, ArraySpec]:
    """Array specs for a clip's Gram flow.

    float16: `gram_flow`, compressed. uint8: `gram_flow`, and float16 `low` and `step` per token.
    Crossed: additionally the same arrays with the suffix `_back`. `valid` is added by the store.
    """
    one_direction = _one_direction_spec(pairs, height, width, radius, dtype)
    return one_direction if stored == "forward" else one_direction | with_back_suffix(one_direction)


def with_back_suffix(arrays: Mapping[str, Value]) -> dict[str, Value]:
    """Rename arrays to those of a crossed flow from each map to the previous one."""
    return {name + _BACK: value for name, value in arrays.items()}


def back_arrays(arrays: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the arrays with the suffix `_back`, without it, for `decode_gram_flow`; None if the
    flow is not crossed."""
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
def compute_gram_flow(
    features_THWG: Tensor,
    *,
    radius: int,
    token_grid: tuple[int, int],
    native_parts: int | None = None,
    norm_P: Tensor | None = None,
) -> Tensor:
    """Compute the similarities of a clip's stored features on the student's token grid.

    Args:
        features_THWG: Features from `decode_features`.
        radius: Radius of the window in tokens.
        token_grid: Rows and columns of the student's tokens.
        native_parts: Number of parts of features on SAM2's own grid, which are resampled; None
            for features on the student's grid.
        norm_P: Norms of the parts over the whole clip, if `features_THWG` is a slice of its maps;
            see `regrid_fused`.

    Returns:
        flow_PHWK, float32 (float64 for float64 input); 0 for neighbours outside the grid.

    Raises:
        ValueError: The features are on another grid, or there are fewer than two maps.
    """
    if native_parts is not None:
        features_THWG = regrid_fused(features_THWG, *token_grid, native_parts, norm_P=norm_P)
    T, H, W, _ = features_THWG.shape
    if token_grid != (H, W):
        raise ValueError(f"features are on a grid of {(H, W)} tokens, not {token_grid}")
    if T < 2:
        raise ValueError(f"a Gram flow needs two maps or more, got {T}")
    return local_gram_flow(features_THWG[None], radius)[0]


@torch.no_grad()
def encode_gram_flow(flow_PHWK: Tensor, dtype: FlowDtype) -> dict[str, np.ndarray]:
    """Encode a clip's Gram flow as arrays on the host.

    float16 stores the nearest multiple of `FLOAT16_STEP`: exact to half of it.

    uint8 stores (value - low) / step, rounded. Over a token's neighbours inside the grid, low is
    the minimum rounded down to float16, and step is (maximum - low) / 255 rounded up.
    `decode_gram_flow` is exact to half a step; windows with a single float16 value are exact.
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
    """Decode the Gram flow of a clip or a batch: float32 [..., P, H, W, K] on the arrays' device.

    Args:
        arrays: The stored arrays, with any leading axes and any number of pairs.
    """
    flow = arrays["gram_flow"].float()
    if "step" not in arrays:
        return flow
    flow = flow * arrays["step"].float()[..., None] + arrays["low"].float()[..., None]
    return flow.masked_fill(~_inside(flow), 0.0)


def narrow_window(flow_PHWK: Tensor, radius_stored: int, radius_wanted: int) -> Tensor:
    """Crop a Gram flow to the centre of its window.

    Raises:
        ValueError: The requested radius is larger, or K does not match the stored radius.
    """
    if radius_of_window(flow_PHWK.shape[-1]) != radius_stored:
        raise ValueError(
            f"{flow_PHWK.shape[-1]} neighbours are not a window of radius {radius_stored}"
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
    """Mask of neighbours inside the grid: bool [H, W, K]."""
    H, W, K = flow_PHWK.shape[-3:]
    return neighbour_mask(H, W, radius_of_window(K), flow_PHWK.device)


def _on_host(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.cpu().numpy())
