"""How far rounding alone carries a tracker, as a bound for comparing two trackers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def nudged() -> Callable[[Any], Any]:
    """Copies a SAM2 model so that one memory value in a hundred is about a bfloat16 step off.

    Memories are kept in bfloat16. Two programs that are equal up to float32's rounding can differ
    in the last bit of some values; which ones depends on the processor, so no fixed bound holds.
    """

    def copy_of(model: Any) -> Any:
        model = copy.deepcopy(model)
        encode = model._encode_new_memory
        up_or_down = torch.Generator().manual_seed(0)

        def encode_off(**inputs: Any) -> Any:
            memory, positions = encode(**inputs)
            chance = torch.rand(memory.shape, generator=up_or_down)
            steps = (chance < 0.005).float() - (chance > 0.995).float()
            return memory * (1 + steps * 2**-8), positions

        model._encode_new_memory = encode_off
        return model

    return copy_of
