"""The Triton kernel, carried out on a CPU by Triton's own interpreter."""

import importlib
import sys

import pytest
import torch

from stages.local_gram_flow import local_gram_flow

NAME = "stages.local_gram_flow.triton_cosines"


@pytest.fixture(scope="module")
def cosines():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is declared
        patch.delitem(sys.modules, NAME, raising=False)
        module = importlib.import_module(NAME)
        patch.setattr(module, "_RUN", 16)
        yield lambda features, radius: module.TritonWindowCosines.apply(features, radius, 1e-12)
    sys.modules.pop(NAME, None)


SHAPES = {
    "several clips": ((2, 3, 3, 4, 6), 1),
    "rows of several runs": ((1, 2, 2, 19, 5), 2),
    "channels of several runs": ((1, 2, 3, 2, 37), 1),
    "a window beyond the grid": ((1, 3, 2, 2, 4), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradient_equal_the_plain_form_in_float64(cosines, name, dtype):
    """Of bfloat16 features, the gradient is rounded to bfloat16 at the end, and nothing else is."""
    shape, radius = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(shape, generator=generator).to(dtype)
    found_from, exact_from = given.clone().requires_grad_(), given.double().requires_grad_()
    found, exact = cosines(found_from, radius), local_gram_flow(exact_from, radius)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    upstream = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    found.backward(upstream.float())
    exact.backward(upstream)
    scale = float(exact_from.grad.abs().max())
    tolerance = scale * (1e-6 if dtype == torch.float32 else 2**-8)
    assert found_from.grad.dtype == dtype
    torch.testing.assert_close(found_from.grad.double(), exact_from.grad, rtol=0, atol=tolerance)


def test_a_token_of_zeros_is_like_nothing(cosines):
    features = torch.zeros(1, 2, 2, 2, 3, requires_grad=True)
    flow = cosines(features, 1)
    flow.sum().backward()
    assert not flow.any()
    assert features.grad.isfinite().all()
