"""The Triton kernel on a CPU, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.local_gram_flow import local_gram_flow

SCRIPT = Path(__file__).with_name("triton_on_cpu.py")
SHAPES = {
    "several clips": ((2, 3, 3, 4, 6), 1),
    "rows of several runs": ((1, 2, 2, 19, 5), 2),
    "channels of several runs": ((1, 2, 3, 2, 37), 1),
    "a window beyond the grid": ((1, 3, 2, 2, 4), 3),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def cases():
    """Features, the gradient that comes back, and the radius, by name."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (shape, radius) in SHAPES.items():
        B, T, H, W, _ = shape
        upstream = torch.randn(B, T - 1, H, W, (2 * radius + 1) ** 2, generator=generator)
        features = torch.randn(shape, generator=generator)
        for dtype in DTYPES:
            made[f"{name}, {dtype}"] = (features.to(DTYPES[dtype]), upstream, radius)
    made["zeros"] = (torch.zeros(1, 2, 2, 2, 3), torch.ones(1, 1, 2, 2, 9), 1)
    return made


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory):
    """What the kernel makes of the cases: values and gradient."""
    folder = tmp_path_factory.mktemp("triton")
    torch.save(cases, folder / "cases.pt")
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "cases.pt"), str(folder / "found.pt")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SCRIPT.parents[3])},
        check=True,
    )
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradient_equal_the_plain_form_in_float64(cases, found, name, dtype):
    """Of bfloat16 features, the gradient is rounded to bfloat16 at the end, and nothing else is."""
    features, upstream, radius = cases[f"{name}, {dtype}"]
    values, gradient = found[f"{name}, {dtype}"]
    leaf = features.double().requires_grad_()
    exact = local_gram_flow(leaf, radius)
    exact.backward(upstream.double())
    assert (values.dtype, gradient.dtype) == (torch.float32, features.dtype)
    torch.testing.assert_close(values.double(), exact.detach(), rtol=0, atol=1e-6)
    tolerance = float(leaf.grad.abs().max()) * (1e-6 if dtype == "float32" else 2**-8)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=0, atol=tolerance)


def test_a_token_of_zeros_is_like_nothing(found):
    values, gradient = found["zeros"]
    assert not values.any()
    assert gradient.isfinite().all()
