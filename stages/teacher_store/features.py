"""Fused features as stored: float16, or int8 with one scale per token.

Legend: T map of the teacher, H W token grid, G fused channel.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cache_schema import ArraySpec
from stages.teacher_store.config import FeatureDtype as FeatureDtype

_BITS_BELOW_ZERO = -(2**15) + 1
"""Bits of the float16 just below zero, as int16."""


def round_down_to_float16(values: Tensor) -> Tensor:
    """The largest float16 that is not above each value."""
    nearest = values.to(torch.float16)
    bits = nearest.view(torch.int16)
    # Sign and magnitude: towards negative infinity the magnitude falls above zero, and grows below.
    below = torch.where(nearest > 0, bits - 1, bits + 1)
    below = torch.where(nearest == 0, _BITS_BELOW_ZERO, below).to(torch.int16)
    return torch.where(nearest > values, below.view(torch.float16), nearest)


def round_up_to_float16(values: Tensor) -> Tensor:
    """The smallest float16 that is not below each value."""
    return -round_down_to_float16(-values)


_INT8_MAX = 127
"""The largest magnitude of a stored int8; -128 does not occur."""


def feature_arrays_spec(
    shape: tuple[int, int, int, int], dtype: FeatureDtype
) -> dict[str, ArraySpec]:
    """What a store holds of each clip's features of shape (t, h, w, g).

    float16: `features`. int8: `features`, and `scale`, float16 for each token, which alone is
    compressed: features would shrink little for what unpacking them costs. `valid` is the store's
    own.
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
    """The arrays of a clip's features, on the host.

    int8 holds value / scale, rounded, where the scale is the token's largest magnitude over 127,
    rounded up to float16: what `decode_features` returns is off by half a scale at most. A token of
    zeros stays zero.

    Args:
        fused_THWG: any floating type. What is not finite, or too large for float16, is not finite
            in `features` or `scale` either.
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
    """The features of a clip or a batch, on the arrays' device.

    Args:
        arrays: as they were stored; with any leading axes.

    Returns:
        fused [..., T, H, W, G]: float16 as it was stored, from int8 float32.
    """
    if "scale" not in arrays:
        return arrays["features"]
    return arrays["features"].float() * arrays["scale"].float()[..., None]


def _on_host(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.cpu().numpy())
