"""FLOP and byte counts against closed forms."""

import gc

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from stages.compute_cost.flop_counter import FlopCounter, matmul_flops_per_second, weight_bytes

META = torch.device("meta")


def test_a_linear_layer_costs_two_operations_per_weight_and_row():
    layer = torch.nn.Linear(48, 32, device=META)
    with FlopCounter() as meter:
        layer(torch.empty(5, 48, device=META))
    assert meter.flops == 2 * 5 * 48 * 32


def test_a_convolution_costs_its_kernel_at_every_output():
    layer = torch.nn.Conv3d(4, 6, kernel_size=(3, 5, 5), bias=False, device=META)
    with FlopCounter() as meter:
        out = layer(torch.empty(2, 4, 7, 20, 30, device=META))
    assert meter.flops == 2 * out.numel() * 4 * 3 * 5 * 5


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_costs_two_products_and_no_table_of_scores(device):
    query = torch.empty(2, 3, 70, 16, device=device)
    key = torch.empty(2, 3, 90, 16, device=device)
    value = torch.empty(2, 3, 90, 24, device=device)
    with FlopCounter() as meter:
        attended = F.scaled_dot_product_attention(query, key, value)
        assert attended.shape == (2, 3, 70, 24)
    assert meter.flops == 2 * 2 * 3 * 70 * 90 * (16 + 24)
    assert meter.peak_bytes == attended.numel() * 4


def test_bytes_come_and_go_with_their_tensors():
    weights = torch.empty(100, 10, device=META)
    with FlopCounter() as meter:
        first = torch.empty(1000, device=META)
        assert meter.live_bytes == 4000
        doubled = first * 2
        view = doubled.view(10, 100)[:2]
        assert meter.live_bytes == 8000
        del doubled
        assert meter.live_bytes == 8000, "the view holds the whole"
        del view
        assert meter.live_bytes == 4000
        halves = first.to(torch.float16)
        assert meter.live_bytes == 4000 + 2000
        _ = weights.t()
        first.add_(1)
        assert meter.live_bytes == 6000, "neither a view of old weights nor a change in place"
        del first, halves
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 8000


def test_a_backward_pass_costs_two_products_for_each_of_the_forward_pass():
    layers = torch.nn.Sequential(*[torch.nn.Linear(32, 32, device=META) for _ in range(2)])
    rows = torch.empty(5, 32, device=META, requires_grad=True)
    product = 2 * 5 * 32 * 32
    with FlopCounter(training=True) as meter:
        loss = layers(rows).sum()
        assert meter.flops == 2 * product
        loss.backward()
    assert meter.flops == 2 * product * 3
    with FlopCounter(training=True) as meter:
        layers.requires_grad_(False)(rows).sum().backward()
    assert meter.flops == 2 * product * 2, "frozen weights have no gradient"


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_costs_five_products_backward_and_keeps_what_the_fused_kernel_keeps(device):
    shapes = (70, 16), (90, 16), (90, 24)
    inputs = [torch.empty(2, 3, *s, device=device, requires_grad=True) for s in shapes]
    pairs = 2 * 3 * 70 * 90
    with FlopCounter(training=True) as meter:
        attended = F.scaled_dot_product_attention(*inputs)
        assert meter.flops == 2 * pairs * (16 + 24)
        assert meter.live_bytes == 4 * (attended.numel() + 2 * 3 * 70), "rows' sums of scores"
        attended.backward(torch.empty_like(attended))
    assert meter.flops == 2 * pairs * (16 + 24) + 2 * pairs * (3 * 16 + 2 * 24)
    assert meter.recomputed_flops == 2 * pairs * 16
    assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_kept_for_the_backward_pass_is_alive_until_then(device):
    rows = torch.empty(1000, device=device, requires_grad=True)
    with FlopCounter(training=True) as meter:
        squares = rows.sin().sin().sin().sum()
        gc.collect()
        # The inputs of the second and third sine; the first one's is older.
        assert meter.live_bytes == 2 * 4000 + 4
        squares.backward()
        del squares
        gc.collect()
        assert meter.live_bytes == 4000, "the gradient"


def test_gradient_checkpointing_keeps_less_and_runs_the_forward_pass_again():
    layers = torch.nn.Sequential(
        *[m for _ in range(8) for m in (torch.nn.Linear(64, 64, device=META), torch.nn.GELU())]
    )
    gradient_bytes = 8 * (64 * 64 + 64) * 4
    costs = []
    for again in (False, True):
        rows = torch.empty(500, 64, device=META, requires_grad=True)
        layers.zero_grad(set_to_none=True)
        with FlopCounter(training=True) as meter:
            hidden = rows
            for pair in range(0, 16, 4):
                part = layers[pair : pair + 4]
                hidden = checkpoint(part, hidden, use_reentrant=False) if again else part(hidden)
            kept = meter.live_bytes
            hidden.sum().backward()
            del hidden
            gc.collect()
            assert meter.live_bytes == rows.grad.numel() * 4 + gradient_bytes
        costs.append((meter.flops, kept))
    forward = 8 * 2 * 500 * 64 * 64
    (flops, kept), (flops_again, kept_again) = costs
    assert flops == 3 * forward
    # Running a part again stops at the last activation that the backward pass needs.
    assert 3.4 * forward < flops_again <= 4 * forward
    assert kept_again < kept / 2


def test_attention_that_is_run_again_is_the_fused_kernel_again():
    inputs = [torch.empty(2, 3, 70, 16, device=META, requires_grad=True) for _ in range(3)]
    with FlopCounter(training=True) as meter:
        attended = checkpoint(F.scaled_dot_product_attention, *inputs, use_reentrant=False)
        attended.sum().backward()
    product = 2 * 2 * 3 * 70 * 70 * 16
    assert meter.flops == (2 + 2 + 5) * product


def test_weights_are_counted_in_their_own_format():
    layer = torch.nn.BatchNorm1d(8)  # weight, bias, two running statistics, and a counter
    assert weight_bytes(layer) == 4 * 8 * 4 + 8
    assert weight_bytes(torch.nn.Linear(4, 4, dtype=torch.bfloat16)) == (16 + 4) * 2


def test_the_rate_of_products_is_that_of_a_machine():
    assert 1e7 < matmul_flops_per_second(torch.device("cpu"), torch.float32) < 1e15
