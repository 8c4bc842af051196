"""How far rounding alone carries a tracker, as a bound for comparing two trackers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def nudged() -> Callable[[Any], Any]:
    """Makes a copy of a model with every weight moved to its next float32, up or down.

    What that changes is as much as rounding can on any processor. Memories are kept in bfloat16,
    where a difference in float32's last bit can become one of 2**-8, so that no fixed bound holds.
    """

    def copy_of(model: Any) -> Any:
        model = copy.deepcopy(model)
        up_or_down = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                signs = torch.randint(0, 2, weight.shape, generator=up_or_down) * 2.0 - 1
                weight.copy_(torch.nextafter(weight, signs * torch.inf))
        return model

    return copy_of
