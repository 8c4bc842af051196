import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.evaluate.distances import (
    MIN_VIDEOS_FRECHET,
    MIN_VIDEOS_MMD,
    frechet_distance,
    kernel_mmd,
)

seeds = st.integers(0, 2**32 - 1)


def with_moments(mean, covariance, videos, seed=0):
    """Samples whose mean and unbiased covariance are exactly these."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    raw = np.random.default_rng(seed).normal(size=(videos, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(raw.T)))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def random_covariance(rng, dims):
    factor = rng.normal(size=(dims, dims))
    return factor @ factor.T + 0.1 * np.eye(dims)


def distance(first, second):
    return frechet_distance(first, second, allow_few=True)


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


class TestFrechet:
    def test_equal_covariances_leave_the_means(self):
        covariance = random_covariance(np.random.default_rng(0), 3)
        first = with_moments([1.0, 2.0, 3.0], covariance, 300, seed=1)
        second = with_moments([2.0, 0.0, 3.5], covariance, 280, seed=2)
        assert frechet_distance(first, second) == pytest.approx(1 + 4 + 0.25, rel=1e-9)

    def test_commuting_covariances_compare_standard_deviations(self):
        turn = rotation(np.random.default_rng(3), 4)
        deviations = np.array([[1.0, 2.0, 0.5, 3.0], [2.0, 2.5, 0.1, 1.0]])
        first, second = (
            with_moments(np.zeros(4), turn @ np.diag(one**2) @ turn.T, 300, seed=4 + one.argmin())
            for one in deviations
        )
        expected = ((deviations[0] - deviations[1]) ** 2).sum()
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("dims", [1, 2, 7, 40])
    def test_general_covariances_by_eigenvalues_of_their_product(self, dims):
        rng = np.random.default_rng(dims)
        means, covariances = (
            rng.normal(size=(2, dims)),
            [random_covariance(rng, dims) for _ in "12"],
        )
        first, second = (
            with_moments(mean, covariance, 300, seed=seed)
            for seed, (mean, covariance) in enumerate(zip(means, covariances, strict=True))
        )
        eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1])
        assert np.abs(eigenvalues.imag).max() < 1e-6
        trace = np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(eigenvalues.real).sum()
        expected = ((means[0] - means[1]) ** 2).sum() + trace
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)

    def test_fewer_videos_than_dimensions_by_the_symmetric_form(self):
        rng = np.random.default_rng(5)
        first, second = rng.normal(size=(12, 64)), rng.normal(size=(9, 64)) * 2 + 1
        values, vectors = np.linalg.eigh(np.cov(first, rowvar=False))
        root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
        covariance = np.cov(second, rowvar=False)
        inner = np.linalg.eigvalsh(root @ covariance @ root).clip(0)
        # Rounding makes the 56 zero eigenvalues as large as 1e-14, and their roots 1e-7.
        shared = np.sqrt(inner[inner > 1e-9 * inner.max()]).sum()
        shift = first.mean(axis=0) - second.mean(axis=0)
        expected = shift @ shift + values.sum() + np.trace(covariance) - 2 * shared
        assert distance(first, second) == pytest.approx(expected, rel=1e-9)

    def test_orthogonal_subspaces_add_their_variances(self):
        rng = np.random.default_rng(6)
        first, second = np.zeros((2, 8, 20))
        first[:, :5], second[:, 10:15] = rng.normal(size=(2, 8, 5))
        first -= first.mean(axis=0)
        second -= second.mean(axis=0)
        expected = first.var(axis=0, ddof=1).sum() + second.var(axis=0, ddof=1).sum()
        assert distance(first, second) == pytest.approx(expected, rel=1e-12)

    @settings(max_examples=30)
    @given(seed=seeds, videos=st.integers(2, 30), dims=st.integers(1, 40))
    def test_is_zero_for_equal_sets_in_any_order(self, seed, videos, dims):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(videos, dims)) * 10.0 ** rng.uniform(-3, 3)
        found = distance(features, rng.permutation(features))
        assert 0 <= found <= 1e-12 * np.square(features).sum()

    @settings(max_examples=30)
    @given(seed=seeds, videos=st.integers(2, 30), more=st.integers(2, 30), dims=st.integers(1, 40))
    def test_symmetry_order_and_rotation_do_not_matter(self, seed, videos, more, dims):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=(videos, dims)), rng.normal(1, 2, size=(more, dims))
        expected = pytest.approx(distance(first, second), rel=1e-9)
        turn = rotation(rng, dims)
        assert distance(second, first) == expected
        assert distance(rng.permutation(first), rng.permutation(second)) == expected
        assert distance(first @ turn, second @ turn) == expected

    def test_bias_falls_with_the_number_of_videos(self):
        rng = np.random.default_rng(7)
        few, many = (
            distance(rng.normal(size=(count, 16)), rng.normal(size=(count, 16)))
            for count in (30, 3000)
        )
        assert few > 20 * many > 0

    def test_few_videos_are_refused_with_the_alternative(self):
        few, enough = np.zeros((255, 2)), np.zeros((MIN_VIDEOS_FRECHET, 2))
        assert frechet_distance(enough, enough) == 0
        for pair in ((few, enough), (enough, few)):
            with pytest.raises(ValueError, match=r"got 255: its bias grows .* MMD"):
                frechet_distance(*pair)
            assert frechet_distance(*pair, allow_few=True) == 0
        with pytest.raises(ValueError, match="first set has 1 videos"):
            distance(np.zeros((1, 2)), enough)


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


@pytest.mark.parametrize("compute", [distance, lambda a, b: kernel_mmd(a, b, seed=0)])
class TestChecks:
    @pytest.mark.parametrize("shapes", [((20,), (20, 2)), ((20, 2), (20, 3)), ((20, 0), (20, 0))])
    def test_other_shapes_are_refused(self, compute, shapes):
        with pytest.raises(ValueError, match="features must be"):
            compute(np.zeros(shapes[0]), np.zeros(shapes[1]))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_features_that_are_not_finite_are_refused(self, compute, value):
        features = np.zeros((20, 2))
        features[[7, 9], 1] = value
        with pytest.raises(ValueError, match=r"2 videos of the second set .* number 7"):
            compute(np.zeros((20, 2)), features)

    def test_float32_is_computed_in_float64(self, compute):
        first, second = np.random.default_rng(12).normal(1000, 1, size=(2, 20, 3)).astype("f4")
        assert compute(first, second) == compute(first.astype("f8"), second.astype("f8"))
