"""Counts of operations and bytes against closed forms."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.extract_features.estimates.flops import Meter, matmul_flops_per_second, weight_bytes

META = torch.device("meta")


def test_a_linear_layer_costs_two_operations_per_weight_and_row():
    layer = torch.nn.Linear(48, 32, device=META)
    with Meter() as meter:
        layer(torch.empty(5, 48, device=META))
    assert meter.flops == 2 * 5 * 48 * 32


def test_a_convolution_costs_its_kernel_at_every_output():
    layer = torch.nn.Conv3d(4, 6, kernel_size=(3, 5, 5), bias=False, device=META)
    with Meter() as meter:
        out = layer(torch.empty(2, 4, 7, 20, 30, device=META))
    assert meter.flops == 2 * out.numel() * 4 * 3 * 5 * 5


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_costs_two_products_and_no_table_of_scores(device):
    query = torch.empty(2, 3, 70, 16, device=device)
    key = torch.empty(2, 3, 90, 16, device=device)
    value = torch.empty(2, 3, 90, 24, device=device)
    with Meter() as meter:
        attended = F.scaled_dot_product_attention(query, key, value)
        assert attended.shape == (2, 3, 70, 24)
    assert meter.flops == 2 * 2 * 3 * 70 * 90 * (16 + 24)
    assert meter.peak_bytes == attended.numel() * 4


def test_bytes_come_and_go_with_their_tensors():
    weights = torch.empty(100, 10, device=META)
    with Meter() as meter:
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


def test_weights_are_counted_in_their_own_format():
    layer = torch.nn.BatchNorm1d(8)  # weight, bias, two running statistics, and a counter
    assert weight_bytes(layer) == 4 * 8 * 4 + 8
    assert weight_bytes(torch.nn.Linear(4, 4, dtype=torch.bfloat16)) == (16 + 4) * 2


def test_the_rate_of_products_is_that_of_a_machine():
    assert 1e7 < matmul_flops_per_second(torch.device("cpu"), torch.float32) < 1e15
