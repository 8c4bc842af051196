"""The stored Gram flow against loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import local_gram_flow, neighbour_mask
from stages.teacher_store.config import FlowDtype
from stages.teacher_store.gram_flow import (
    FLOAT16_STEP,
    compute_gram_flow,
    decode_gram_flow,
    encode_gram_flow,
    flow_arrays_spec,
    narrow_window,
)
from tests.stages.extract_features.teacher.grid_reference import on_grid
from tests.stages.local_gram_flow.reference import kl_by_loop, similarities_by_loop

shapes = st.tuples(st.integers(2, 12), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5))


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


@settings(max_examples=40)
@given(shape=shapes, radius=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_flow_of_features_equals_a_float64_loop(
    shape: tuple[int, int, int, int], radius: int, seed: int
) -> None:
    features = drawn(shape, seed).half()
    expected, _ = similarities_by_loop(features.double().numpy()[None], radius)
    found = compute_gram_flow(features, radius=radius, token_grid=shape[1:3])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected[0], atol=1e-6, rtol=0)


def test_native_features_are_brought_to_the_token_grid_part_by_part() -> None:
    # Two parts whose tokens weigh 0.6 and 0.8, as fused directions do.
    raw = [drawn((3, 16, 8, 8), seed).double().numpy() for seed in (1, 2)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in raw]
    fused_TCHW = np.concatenate([0.6 * unit[0], 0.8 * unit[1]], axis=1)
    flows = []
    for part in unit:
        regridded = on_grid(part, 5, 7)
        flows.append(similarities_by_loop(regridded[None], 2)[0][0])
    expected = 0.36 * flows[0] + 0.64 * flows[1]
    found = compute_gram_flow(
        torch.from_numpy(fused_TCHW).permute(0, 2, 3, 1).float(),
        radius=2,
        token_grid=(5, 7),
        native_parts=2,
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=0)


def test_maps_of_zeros_have_a_flow_of_zeros() -> None:
    features = drawn((4, 3, 5, 6), 3)
    features[2] = 0.0
    flow = compute_gram_flow(features, radius=1, token_grid=(3, 5))
    assert not flow[1:].any()
    assert flow[0].any()


def test_features_on_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grid of \(3, 5\) tokens, not \(3, 4\)"):
        compute_gram_flow(drawn((4, 3, 5, 6), 3), radius=1, token_grid=(3, 4))
    with pytest.raises(ValueError, match="two maps or more, got 1"):
        compute_gram_flow(drawn((1, 3, 5, 6), 3), radius=1, token_grid=(3, 5))


@settings(max_examples=40)
@given(shape=shapes, radius=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_uint8_codes_equal_a_float64_loop(
    shape: tuple[int, int, int, int], radius: int, seed: int
) -> None:
    values, inside = similarities_by_loop(drawn(shape, seed).double().numpy()[None], radius)
    flow, inside = torch.from_numpy(values[0]).float(), inside[0]
    arrays = encode_gram_flow(flow, "uint8")
    decoded = decode_gram_flow(as_tensors(arrays)).numpy().astype(np.float64)
    for place in np.ndindex(flow.shape[:3]):
        window = flow.numpy()[place].astype(np.float64)
        keep = inside[place]
        low, step = float(arrays["low"][place]), float(arrays["step"][place])
        assert low <= window[keep].min()
        assert low + 255 * step >= window[keep].max() - 1e-6
        by_hand = low + step * arrays["gram_flow"][place].astype(np.float64)
        np.testing.assert_allclose(decoded[place][keep], by_hand[keep], atol=2**-23, rtol=0)
        # The bound that is promised: half a step, for every value.
        assert np.abs(decoded[place] - window)[keep].max() <= 0.50005 * step + 2**-23
        assert not decoded[place][~keep].any()
        assert not arrays["gram_flow"][place][~keep].any()


def test_the_range_of_an_edge_is_that_of_its_neighbours_inside() -> None:
    # All similarities lie near 0.9; zeros outside the grid must not widen the range.
    flow = 0.9 + 0.01 * torch.rand((2, 4, 5, 49), generator=torch.Generator().manual_seed(4))
    flow *= neighbour_mask(4, 5, 3)
    arrays = encode_gram_flow(flow, "uint8")
    assert arrays["step"].max() < 0.012 / 255
    decoded = decode_gram_flow(as_tensors(arrays))
    assert (decoded - flow).abs().max() < 0.006 / 255


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0, 1.0, 0.3, -0.7, 1e-9])
def test_uint8_windows_of_one_value_are_kept_within_half_a_step(value: float) -> None:
    flow = torch.full((1, 3, 4, 9), value) * neighbour_mask(3, 4, 1)
    arrays = encode_gram_flow(flow, "uint8")
    decoded = decode_gram_flow(as_tensors(arrays))
    step = float(arrays["step"].max())
    assert (decoded - flow).abs().max() <= 0.50005 * step + 2**-23
    assert step <= 2**-11 / 255 + 2**-24
    if float(np.float16(value)) == np.float32(value):
        assert torch.equal(decoded, flow)


@settings(max_examples=40)
@given(shape=shapes, radius=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_float16_holds_the_nearest_multiple_of_its_step(
    shape: tuple[int, int, int, int], radius: int, seed: int
) -> None:
    values, _ = similarities_by_loop(drawn(shape, seed).double().numpy()[None], radius)
    flow = torch.from_numpy(values[0]).float()
    found = decode_gram_flow(as_tensors(encode_gram_flow(flow, "float16")))
    assert found.dtype == torch.float32
    expected = np.rint(flow.double().numpy() * 1024) / 1024
    np.testing.assert_array_equal(found.double().numpy(), expected)
    # The bound that is promised: half a step, for every value.
    assert (found.double() - flow.double()).abs().max() <= FLOAT16_STEP / 2 == 2**-11


def test_the_divergence_that_rounding_adds_is_as_stated() -> None:
    def smooth(seed: int) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(drawn((3, 64, 16, 16), seed), 3, 1, 1)

    features = (smooth(10) + 0.5 * drawn((1, 64, 1, 1), 11)).permute(0, 2, 3, 1)
    flow, inside = similarities_by_loop(features.double().numpy()[None], 3)
    stored = encode_gram_flow(torch.from_numpy(flow[0]), "float16")
    found = decode_gram_flow(as_tensors(stored)).double().numpy()
    divergence = kl_by_loop(found[None], flow, inside, 0.1)
    assert 0 < divergence < FLOAT16_STEP**2 / (24 * 0.1**2)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_arrays_are_as_specified_and_decode_in_batches_and_in_part(dtype: FlowDtype) -> None:
    flows = [local_gram_flow(drawn((1, 5, 4, 6, 8), seed), 2)[0] for seed in (6, 7)]
    arrays = [as_tensors(encode_gram_flow(flow, dtype)) for flow in flows]
    specs = flow_arrays_spec(4, 4, 6, 2, dtype)
    assert {name: (a.shape, a.numpy().dtype) for name, a in arrays[0].items()} == {
        name: (spec.shape, spec.numpy_dtype) for name, spec in specs.items()
    }
    batch = {name: torch.stack([one[name] for one in arrays]) for name in arrays[0]}
    expected = torch.stack([decode_gram_flow(one) for one in arrays])
    assert torch.equal(decode_gram_flow(batch), expected)
    crop = {name: values[1:3] for name, values in arrays[0].items()}
    assert torch.equal(decode_gram_flow(crop), expected[0, 1:3])


@pytest.mark.parametrize(("stored", "wanted"), [(3, 1), (3, 2), (3, 3), (2, 1)])
def test_a_narrowed_window_equals_the_flow_of_the_smaller_radius(stored: int, wanted: int) -> None:
    features = drawn((2, 3, 4, 6, 8), 8)
    narrowed = narrow_window(local_gram_flow(features, stored), stored, wanted)
    torch.testing.assert_close(narrowed, local_gram_flow(features, wanted), atol=5e-7, rtol=0)


@pytest.mark.parametrize(("stored", "wanted"), [(2, 3), (2, 0), (3, 2)])
def test_a_window_that_is_not_stored_is_refused(stored: int, wanted: int) -> None:
    flow = local_gram_flow(drawn((1, 3, 4, 6, 8), 9), 2)
    with pytest.raises(ValueError, match="radius"):
        narrow_window(flow, stored, wanted)
