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


def test_products_per_window_row_as_on_a_gpu_give_the_same() -> None:
    """Five pairs, so that a full group of a CPU's pairs is followed by a smaller one."""
    features = torch.randn(2, 6, 4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    upstream = torch.randn(2, 5, 4, 5, 25, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for by_pair in (True, False):
        leaf = features.clone().requires_grad_()
        flow = local_gram_flow(leaf, 2) if by_pair else similarities._ClipCosines.apply(leaf, 2)
        flow.backward(upstream)
        found.append((flow.detach(), leaf.grad))
    for by_pair, by_row in zip(*found, strict=True):
        torch.testing.assert_close(by_pair, by_row, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["channels first", "slice"])
def test_the_layout_in_memory_changes_nothing(layout: str) -> None:
    stored = torch.randn(1, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    upstream = torch.randn(6, 6, 9, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for contiguous in (True, False):
        leaf = stored.clone().requires_grad_()
        view = leaf.transpose(2, 4) if layout == "channels first" else leaf[..., 1:, :-1, 1:]
        flow = local_gram_flow(view.contiguous() if contiguous else view, 1)
        (flow * upstream[: flow.shape[2], : flow.shape[3]]).sum().backward()
        found.append((flow.detach(), leaf.grad))
    for plain, strided in zip(*found, strict=True):
        torch.testing.assert_close(strided, plain, atol=1e-12, rtol=0)
