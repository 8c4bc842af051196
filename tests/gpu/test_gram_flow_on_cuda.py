"""The Gram flow on a GPU: both kernels against float64 on the CPU."""

from typing import Any

import pytest
import torch

from stages.local_gram_flow import local_gram_flow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_values_and_gradient_equal_float64(kernel: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 5, 30, 45, 256, generator=generator).to(dtype)
    on_gpu, exact_from = given.cuda().requires_grad_(), given.double().requires_grad_()
    found, exact = local_gram_flow(on_gpu, 3, kernel=kernel), local_gram_flow(exact_from, 3)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=1e-6)
    upstream = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    found.backward(upstream.float().cuda())
    exact.backward(upstream)
    assert on_gpu.grad is not None and exact_from.grad is not None
    tolerance = float(exact_from.grad.abs().max()) * (1e-5 if dtype == torch.float32 else 2**-8)
    torch.testing.assert_close(on_gpu.grad.cpu().double(), exact_from.grad, rtol=0, atol=tolerance)
