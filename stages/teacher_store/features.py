"""Storage encoding of fused features: float16, or int8 with one scale per token.

Legend: T map of the teacher, H W token grid, G fused channel.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cache_schema import ArraySpec
from stages.teacher_store.config import FeatureDtype as FeatureDtype

_BITS_BELOW_ZERO = -(2**15) + 1
"""Bits of the largest float16 below zero, as int16."""


def round_down_to_float16(values: Tensor) -> Tensor:
    """Round to float16 towards negative infinity."""
    nearest = values.to(torch.float16)
    bits = nearest.view(torch.int16)
    # Sign-magnitude bits: towards negative infinity the magnitude falls above 0 and grows below.
    below = torch.where(nearest > 0, bits - 1, bits + 1)
    below = torch.where(nearest == 0, _BITS_BELOW_ZERO, below).to(torch.int16)
    return torch.where(nearest > values, below.view(torch.float16), nearest)


def round_up_to_float16(values: Tensor) -> Tensor:
    """Round to float16 towards positive infinity."""
    return -round_down_to_float16(-values)


_INT8_MAX = 127
"""Largest magnitude of a stored int8; -128 is not used."""


def feature_arrays_spec(
    shape: tuple[int, int, int, int], dtype: FeatureDtype
) -> dict[str, ArraySpec]:
    """Array specs for features of shape (t, h, w, g).

    float16: `features`. int8: `features`, and a float16 `scale` per token. Only `scale` is
    compressed: compression of `features` saves too little for the cost of decompression. `valid`
    is added by the store.
    """
    axes = ("t", "h", "w", "c")
    specs = {"features": ArraySpec(dtype=dtype, shape=shape, dimension_names=axes)}
    if dtype == "int8":
        specs["scale"] = ArraySpec(
            dtype="float16",
            shape=shape[:3],
            dimension_names=axes[:3],
            compression="blosc-zstd-shuffle",
        )
    return specs


@torch.no_grad()
def encode_features(fused_THWG: Tensor, dtype: FeatureDtype) -> dict[str, np.ndarray]:
    """Encode a clip's features as arrays on the host.

    int8 stores value / scale, rounded, where scale is the token's largest magnitude / 127, rounded
    up to float16; `decode_features` is exact to half a scale. Zero tokens stay zero.

    Args:
        fused_THWG: Any floating dtype. Values that are NaN, infinite or too large for float16 give
            NaN or infinite values in `features` or `scale`.
    """
    if dtype == "float16":
        return {"features": _on_host(fused_THWG.to(torch.float16))}
    values_THWG = fused_THWG.float()
    scale_THW = round_up_to_float16(values_THWG.abs().amax(dim=-1) / _INT8_MAX)
    divisor_THW1 = torch.where(scale_THW > 0, scale_THW.float(), 1.0)[..., None]
    return {
        "features": _on_host((values_THWG / divisor_THW1).round().to(torch.int8)),
        "scale": _on_host(scale_THW),
    }


def decode_features(arrays: Mapping[str, Tensor]) -> Tensor:
    """Decode the features of a clip or a batch on the arrays' device.

    Args:
        arrays: The stored arrays, with any leading axes.

    Returns:
        fused [..., T, H, W, G]: float16 if stored as float16, float32 if stored as int8.
    """
    if "scale" not in arrays:
        return arrays["features"]
    return arrays["features"].float() * arrays["scale"].float()[..., None]


def _on_host(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.cpu().numpy())
