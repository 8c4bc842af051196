import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.evaluate.distances import (
    MIN_VIDEOS_MMD,
    kernel_mmd,
)

seeds = st.integers(0, 2**32 - 1)


def rotation(rng, dims):
    return np.linalg.qr(rng.normal(size=(dims, dims)))[0]


def mmd_by_loops(first, second):
    """Gretton et al. 2012, equation 3, term by term."""

    def kernel(x, y):
        return (math.fsum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(features):
        count = len(features)
        terms = [kernel(features[i], features[j]) for i in range(count) for j in range(i)]
        return 2 * math.fsum(terms) / (count * (count - 1))

    across = math.fsum(kernel(x, y) for x in first for y in second) / (len(first) * len(second))
    return within(first) + within(second) - 2 * across


class TestMMD:
    @settings(max_examples=15)
    @given(
        seed=seeds,
        videos=st.integers(MIN_VIDEOS_MMD, 14),
        more=st.integers(MIN_VIDEOS_MMD, 14),
        dims=st.integers(1, 5),
    )
    def test_equals_a_double_loop(self, seed, videos, more, dims):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=(videos, dims)), rng.normal(1, 2, size=(more, dims))
        expected = mmd_by_loops(first.tolist(), second.tolist())
        assert kernel_mmd(first, second, seed=0).squared == pytest.approx(
            expected, rel=1e-9, abs=1e-9
        )

    def test_known_value_in_one_dimension(self):
        # x = 0 gives (0 + 1)^3 = 1 with anything; y = 1 gives (1 + 1)^3 = 8 with another y.
        first, second = np.zeros((12, 1)), np.ones((15, 1))
        assert kernel_mmd(first, second, seed=0).squared == 1 + 8 - 2
        assert kernel_mmd(first, second, seed=0).standard_error == 0

    def test_is_unbiased_for_small_sets(self):
        rng = np.random.default_rng(8)
        found = [
            kernel_mmd(rng.normal(size=(10, 4)), rng.normal(size=(10, 4)), seed=0).squared
            for _ in range(400)
        ]
        assert min(found) < 0 < max(found)
        assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(400)

    def test_standard_error_is_that_of_the_mean_of_disjoint_subsets(self):
        rng = np.random.default_rng(9)
        first, second = rng.normal(size=(100, 3)), rng.normal(0.5, 1, size=(100, 3))
        found = kernel_mmd(first, second, seed=4)
        again = np.random.default_rng(4)
        order1, order2 = again.permutation(100), again.permutation(100)
        estimates = [
            mmd_by_loops(first[order1[i : i + 10]], second[order2[i : i + 10]])
            for i in range(0, 100, 10)
        ]
        spread = math.sqrt(sum((one - np.mean(estimates)) ** 2 for one in estimates) / 9)
        assert found.subsets == 10
        assert found.standard_error == pytest.approx(spread / math.sqrt(10), rel=1e-9)

    def test_standard_error_covers_the_spread_of_the_estimate(self):
        rng = np.random.default_rng(10)
        found = [
            kernel_mmd(rng.normal(size=(60, 3)), rng.normal(1, 1, size=(60, 3)), seed=0)
            for _ in range(150)
        ]
        spread = np.std([one.squared for one in found])
        stated = np.sqrt(np.mean([one.standard_error**2 for one in found]))
        assert 0.9 * spread < stated < 1.6 * spread

    @settings(max_examples=30)
    @given(seed=seeds, videos=st.integers(10, 30), more=st.integers(10, 30), dims=st.integers(1, 9))
    def test_symmetry_order_and_rotation_do_not_matter(self, seed, videos, more, dims):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=(videos, dims)), rng.normal(1, 2, size=(more, dims))
        expected = pytest.approx(kernel_mmd(first, second, seed=0).squared, rel=1e-8, abs=1e-8)
        turn = rotation(rng, dims)
        assert kernel_mmd(second, first, seed=1).squared == expected
        assert (
            kernel_mmd(rng.permutation(first), rng.permutation(second), seed=0).squared == expected
        )
        assert kernel_mmd(first @ turn, second @ turn, seed=0).squared == expected

    def test_seed_decides_the_standard_error(self):
        first, second = np.random.default_rng(11).normal(size=(2, 23, 3))
        found = [kernel_mmd(first, second, seed=seed) for seed in (0, 0, 1)]
        assert found[0] == found[1] and found[0].subsets == 4
        assert found[0].squared == found[2].squared
        assert found[0].standard_error != found[2].standard_error

    def test_few_videos_are_refused(self):
        with pytest.raises(ValueError, match="second set has 9 videos, at least 10 needed"):
            kernel_mmd(np.zeros((10, 2)), np.zeros((9, 2)), seed=0)


class TestChecks:
    @pytest.mark.parametrize("shapes", [((20,), (20, 2)), ((20, 2), (20, 3)), ((20, 0), (20, 0))])
    def test_other_shapes_are_refused(self, shapes):
        with pytest.raises(ValueError, match="features must be"):
            kernel_mmd(np.zeros(shapes[0]), np.zeros(shapes[1]), seed=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_features_that_are_not_finite_are_refused(self, value):
        features = np.zeros((20, 2))
        features[[7, 9], 1] = value
        with pytest.raises(ValueError, match=r"2 videos of the second set .* number 7"):
            kernel_mmd(np.zeros((20, 2)), features, seed=0)

    def test_float32_is_computed_in_float64(self):
        first, second = np.random.default_rng(12).normal(1000, 1, size=(2, 20, 3)).astype("f4")
        assert kernel_mmd(first, second, seed=0) == kernel_mmd(
            first.astype("f8"), second.astype("f8"), seed=0
        )
