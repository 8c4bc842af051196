"""Directed rounding to float16, against numpy's nextafter."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.teacher_store.features import round_down_to_float16, round_up_to_float16


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@given(st.floats(-70000, 70000, width=32))
def test_the_result_is_the_closest_float16_on_its_side(value: float) -> None:
    tensor = torch.tensor([value])
    below, above = round_down_to_float16(tensor).numpy()[0], round_up_to_float16(tensor).numpy()[0]
    assert float(below) <= value <= float(above)
    if math.isfinite(float(below)):
        assert float(np.nextafter(below, np.float16(np.inf))) > value
    if math.isfinite(float(above)):
        assert float(np.nextafter(above, np.float16(-np.inf))) < value


@given(st.floats(width=16, allow_nan=False, allow_infinity=False))
def test_a_float16_stays_as_it_is(value: float) -> None:
    tensor = torch.tensor([value])
    assert round_down_to_float16(tensor).item() == value == round_up_to_float16(tensor).item()
