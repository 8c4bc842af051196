"""Reverse pairs computed from forward similarities, without another product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import local_gram_flow, reverse_pairs
from tests.stages.local_gram_flow.reference import similarities_by_loop

shapes = st.tuples(
    st.integers(1, 2), st.integers(2, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)
)


def features_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=40)
@given(shape=shapes, radius=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_it_is_the_second_frames_tokens_in_the_first_by_a_float64_loop(
    shape: tuple[int, ...], radius: int, seed: int
) -> None:
    features = features_of(shape, seed)
    expected, _ = similarities_by_loop(features.numpy(), radius, backward=True)
    found = reverse_pairs(local_gram_flow(features, radius))
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-12, rtol=0)


@settings(max_examples=25)
@given(shape=shapes, radius=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_it_is_the_flow_of_the_reversed_clip_read_from_its_end(
    shape: tuple[int, ...], radius: int, seed: int
) -> None:
    features = features_of(shape, seed)
    flow = local_gram_flow(features, radius)
    of_reversed = local_gram_flow(features.flip(1), radius)
    torch.testing.assert_close(reverse_pairs(flow), of_reversed.flip(1), atol=1e-12, rtol=0)
    assert torch.equal(reverse_pairs(reverse_pairs(flow)), flow)


def test_what_lies_outside_the_grid_is_not_read() -> None:
    flow = local_gram_flow(features_of((1, 3, 3, 4, 5), 0), 2)
    spoiled = flow.masked_fill(flow == 0.0, float("nan"))
    assert spoiled.isnan().any()
    assert torch.equal(reverse_pairs(spoiled), reverse_pairs(flow))


@pytest.mark.parametrize(("height", "width", "radius"), [(3, 4, 1), (2, 3, 2), (4, 1, 1)])
def test_gradient_equals_finite_differences(height: int, width: int, radius: int) -> None:
    features = features_of((1, 3, height, width, 3), 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reverse_pairs(local_gram_flow(x, radius)).square(), features
    )


def test_any_layout_in_memory_gives_the_same() -> None:
    flow = local_gram_flow(features_of((2, 3, 3, 4, 5), 2), 1)
    transposed = flow.transpose(0, 3).contiguous().transpose(0, 3)
    channels_last = flow.contiguous(memory_format=torch.channels_last_3d)
    for other in (transposed, channels_last, torch.cat([flow, flow])[2:]):
        assert torch.equal(reverse_pairs(other), reverse_pairs(flow))


def test_an_axis_that_is_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a window has"):
        reverse_pairs(torch.zeros(1, 1, 2, 2, 8))
