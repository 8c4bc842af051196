from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import local_gram_flow, neighbour_mask, similarities
from tests.stages.local_gram_flow.reference import similarities_by_loop

shapes = st.tuples(
    st.integers(1, 2), st.integers(2, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5)
)


@settings(max_examples=40)
@given(shape=shapes, radius=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_similarities_equal_a_float64_loop(shape: tuple[int, ...], radius: int, seed: int) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    expected, inside = similarities_by_loop(features.numpy(), radius)
    torch.testing.assert_close(
        local_gram_flow(features, radius), torch.from_numpy(expected), atol=1e-12, rtol=0
    )
    _, _, H, W, _ = shape
    mask_HWK = neighbour_mask(H, W, radius)
    assert torch.equal(mask_HWK.expand(inside.shape), torch.from_numpy(inside))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_features_are_compared_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 3, 6, 7, 32).to(dtype)
    expected, _ = similarities_by_loop(features.double().numpy(), 3)
    found = local_gram_flow(features, 3)
    assert found.dtype == torch.float32
    assert (found.double() - torch.from_numpy(expected)).abs().max() < 1e-6


@pytest.mark.parametrize(("height", "width", "radius"), [(3, 4, 1), (2, 3, 2), (4, 1, 1)])
def test_gradient_equals_finite_differences(height: int, width: int, radius: int) -> None:
    torch.manual_seed(1)
    features = torch.randn(1, 3, height, width, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: local_gram_flow(x, radius), features)


def test_scaling_a_token_changes_nothing() -> None:
    torch.manual_seed(2)
    features = torch.randn(1, 2, 4, 4, 8)
    scale = torch.rand(1, 2, 4, 4, 1) * 9 + 0.1
    torch.testing.assert_close(
        local_gram_flow(features * scale, 1), local_gram_flow(features, 1), atol=1e-6, rtol=0
    )


def test_features_that_do_not_require_it_get_no_gradient() -> None:
    assert not local_gram_flow(torch.randn(1, 2, 3, 3, 4), 1).requires_grad


@pytest.mark.parametrize("shape", [(1, 1, 3, 3, 4), (2, 3, 3, 4)])
def test_too_few_frames_or_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frame >= 2"):
        local_gram_flow(torch.zeros(shape), 1)


def test_a_radius_under_one_is_refused() -> None:
    with pytest.raises(ValueError, match="radius must be >= 1"):
        local_gram_flow(torch.zeros(1, 2, 3, 3, 4), 0)


@pytest.mark.parametrize("together", [2, 4])
def test_pairs_taken_together_give_what_they_give_one_by_one(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """As a GPU takes them; five pairs, so that a group of two or four is followed by a smaller."""

    def groups(unit_BTHWC: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
        clips, frames = unit_BTHWC.shape[:2]
        for clip, first in product(range(clips), range(0, frames - 1, together)):
            last = min(first + together, frames - 1)
            yield clip, slice(first, last), slice(first + 1, last + 1)

    features = torch.randn(2, 6, 4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    upstream = torch.randn(2, 5, 4, 5, 25, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for change in (False, True):
        if change:
            monkeypatch.setattr(similarities, "_groups", groups)
        leaf = features.clone().requires_grad_()
        flow = local_gram_flow(leaf, 2)
        flow.backward(upstream)
        found.append((flow.detach(), leaf.grad))
    for one_by_one, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, one_by_one)
