"""Rounding to float16 in a direction that is asked for; both forms' codes have bounds from it."""

import torch
from torch import Tensor

_LEAST_NEGATIVE = -(2**15) + 1
"""Bits of the float16 just below zero, as int16."""


def half_at_most(values: Tensor) -> Tensor:
    """The largest float16 that is not above each value."""
    nearest = values.to(torch.float16)
    bits = nearest.view(torch.int16)
    # Sign and magnitude: towards negative infinity the magnitude falls above zero, and grows below.
    below = torch.where(nearest > 0, bits - 1, bits + 1)
    below = torch.where(nearest == 0, _LEAST_NEGATIVE, below).to(torch.int16)
    return torch.where(nearest > values, below.view(torch.float16), nearest)


def half_at_least(values: Tensor) -> Tensor:
    """The smallest float16 that is not below each value."""
    return -half_at_most(-values)
