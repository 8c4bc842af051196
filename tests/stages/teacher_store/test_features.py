"""Stored features against a token-by-token loop in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.teacher_store.config import FeatureDtype
from stages.teacher_store.features import decode_features, encode_features, feature_arrays_spec

shapes = st.tuples(*(st.integers(1, n) for n in (3, 4, 4, 9)))


def drawn(shape: tuple[int, ...], seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


@settings(max_examples=60)
@given(shape=shapes, seed=st.integers(0, 2**31), exponent=st.integers(-30, 12))
def test_int8_codes_and_scales_equal_a_float64_loop(
    shape: tuple[int, int, int, int], seed: int, exponent: int
) -> None:
    features = drawn(shape, seed, 2.0**exponent)
    arrays = encode_features(features, "int8")
    decoded = decode_features(as_tensors(arrays)).numpy().astype(np.float64)
    for place in np.ndindex(shape[:3]):
        token = features.numpy()[place].astype(np.float64)
        scale = float(arrays["scale"][place])
        wanted = np.abs(token).max() / 127
        # The smallest float16 that is not below, but for float32's own rounding of the quotient.
        assert scale >= wanted * (1 - 2**-24)
        below = float(np.nextafter(arrays["scale"][place], np.float16(-1)))
        assert below < wanted
        codes = arrays["features"][place]
        np.testing.assert_array_equal(decoded[place], codes.astype(np.float64) * scale)
        # The bound that is promised: half a scale, for every value.
        assert np.abs(decoded[place] - token).max() <= scale * (0.5 + 1e-5)
        assert codes.min() >= -127


def test_int8_is_within_a_254th_of_the_tokens_largest_value() -> None:
    features = torch.nn.functional.normalize(drawn((3, 6, 7, 512), 1), dim=-1)
    decoded = decode_features(as_tensors(encode_features(features, "int8")))
    largest = features.abs().amax(dim=-1, keepdim=True)
    assert ((decoded - features).abs() <= largest / 254 * (1 + 2**-9)).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_tokens_of_zeros_stay_zeros(dtype: FeatureDtype) -> None:
    features = drawn((2, 3, 4, 8), 2)
    features[0] = 0.0
    features[1, 1, 2] = 0.0
    decoded = decode_features(as_tensors(encode_features(features, dtype)))
    assert not decoded[0].any()
    assert not decoded[1, 1, 2].any()
    assert decoded[1].any(dim=-1).sum() == 3 * 4 - 1


def test_float16_holds_the_rounded_values() -> None:
    features = drawn((2, 3, 4, 8), 3)
    arrays = encode_features(features.permute(0, 2, 1, 3), "float16")
    assert arrays["features"].flags.c_contiguous
    decoded = decode_features(as_tensors(arrays))
    assert torch.equal(decoded, features.permute(0, 2, 1, 3).half())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_arrays_are_as_specified_and_decode_in_batches(dtype: FeatureDtype) -> None:
    clips = [drawn((2, 3, 4, 8), seed) for seed in (4, 5)]
    arrays = [as_tensors(encode_features(clip, dtype)) for clip in clips]
    specs = feature_arrays_spec((2, 3, 4, 8), dtype)
    assert {name: (a.shape, a.numpy().dtype) for name, a in arrays[0].items()} == {
        name: (spec.shape, spec.numpy_dtype) for name, spec in specs.items()
    }
    batch = {name: torch.stack([one[name] for one in arrays]) for name in arrays[0]}
    expected = torch.stack([decode_features(one) for one in arrays])
    assert torch.equal(decode_features(batch), expected)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_cannot_be_stored_is_not_finite_in_the_arrays(dtype: FeatureDtype, bad: float) -> None:
    features = drawn((2, 3, 4, 8), 6)
    features[1, 2, 3, 4] = bad
    arrays = encode_features(features, dtype)
    assert not all(np.isfinite(values).all() for values in arrays.values())
