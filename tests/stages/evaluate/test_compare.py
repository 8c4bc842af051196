import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import bootstrap

from stages.evaluate.compare import (
    MIN_PROMPTS,
    RESAMPLES,
    compare_pairs,
    mean_of,
)

finite = st.floats(-1e6, 1e6, allow_subnormal=False)


def bca_by_loops(values, seed):
    """Efron and Tibshirani, An Introduction to the Bootstrap, equations 14.9 to 14.15."""
    values = np.sort(values)
    count = len(values)
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    means = np.sort([values[pick].mean() for pick in picks])
    mean = values.mean()
    below = (np.sum(means < mean) + np.sum(means <= mean)) / 2
    bias = ndtri(below / RESAMPLES)
    left_out = np.array([np.delete(values, i).mean() for i in range(count)])
    from_centre = left_out.mean() - left_out
    acceleration = (from_centre**3).sum() / (6 * (from_centre**2).sum() ** 1.5)
    ends = []
    for quantile in (0.025, 0.975):
        shifted = bias + ndtri(quantile)
        ends.append(float(ndtr(bias + shifted / (1 - acceleration * shifted))))
    return np.quantile(means, ends)


class TestMean:
    def test_interval_is_bca_by_its_equations(self):
        values = np.random.default_rng(1).exponential(size=12)
        found = mean_of(values, seed=3)
        assert found.method == "BCa" and found.note == ""
        assert found.mean == pytest.approx(values.mean(), rel=1e-14)
        np.testing.assert_allclose([found.low, found.high], bca_by_loops(values, 3), rtol=1e-9)

    def test_interval_of_many_normal_values_is_the_normal_one(self):
        values = np.random.default_rng(2).normal(5.0, 2.0, 4000)
        found = mean_of(values, seed=0)
        half = 1.96 * values.std(ddof=1) / math.sqrt(4000)
        assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)

    def test_intervals_contain_the_true_mean_about_as_often_as_stated(self):
        rng = np.random.default_rng(4)
        intervals = [mean_of(rng.normal(1.0, 1.0, 20), seed=i) for i in range(100)]
        hits = sum(one.low <= 1.0 <= one.high for one in intervals)
        assert 85 <= hits <= 100  # 93 are expected: BCa is narrow for 20 values

    def test_missing_values_are_counted_and_change_nothing_else(self):
        values = np.random.default_rng(5).normal(size=9)
        found = mean_of([math.nan, *values, math.nan], seed=1)
        known = mean_of(values, seed=1)
        assert (found.missing, found.count) == (2, 9)
        assert (found.mean, found.low, found.high) == (known.mean, known.low, known.high)

    @pytest.mark.parametrize("count", range(MIN_PROMPTS))
    def test_few_values_have_no_interval_and_say_why(self, count):
        found = mean_of([*range(count), math.nan], seed=0)
        assert found.low is found.high is found.method is None
        assert "an interval needs 5" in found.note and str(count) in found.note
        assert math.isnan(found.mean) if count == 0 else found.mean == (count - 1) / 2

    def test_fewest_values_with_an_interval(self):
        assert mean_of(range(MIN_PROMPTS), seed=0).method == "BCa"

    def test_equal_values_have_an_interval_without_width(self):
        found = mean_of([0.1] * 7, seed=0)
        assert (found.low, found.mean, found.high) == (0.1, 0.1, 0.1)
        assert found.method == "percentile" and "equal" in found.note

    @pytest.mark.filterwarnings("error")
    def test_percentile_where_bca_is_undefined(self):
        found = mean_of([1e-170, 2e-170, 3e-170, 4e-170, 5e-170], seed=0)
        assert found.method == "percentile" and "BCa" in found.note
        assert 1e-170 <= found.low < found.mean < found.high <= 5e-170

    @pytest.mark.parametrize("values", [[1.0, math.inf], [-math.inf], [[1.0, 2.0]], 3.0])
    def test_refuses_infinite_values_and_other_shapes(self, values):
        with pytest.raises(ValueError, match=r"infinite|shape"):
            mean_of(values, seed=0)

    def test_other_seeds_give_other_intervals(self):
        values = np.random.default_rng(6).normal(size=10)
        assert mean_of(values, seed=0).low != mean_of(values, seed=1).low

    @settings(max_examples=25)
    @given(values=st.lists(finite | st.just(math.nan), max_size=12), seed=st.integers(0, 2**32))
    def test_order_of_videos_does_not_matter_and_the_mean_is_within(self, values, seed):
        found = mean_of(values, seed=seed)
        assert found.as_dict() == mean_of(values[::-1], seed=seed).as_dict()
        if found.low is not None:
            known = [value for value in values if not math.isnan(value)]
            slack = 1e-9 * max(1.0, *map(abs, known))
            assert min(known) - slack <= found.low <= found.high <= max(known) + slack

    def test_seeds_of_a_prompt_count_as_one_value(self):
        """Against the means of the prompts, given as values of their own."""
        rng = np.random.default_rng(12)
        values_PS = rng.normal(size=(7, 1)) + rng.normal(0.0, 0.1, (7, 4))
        prompts = np.repeat([*"abcdefg"], 4)
        found = mean_of(values_PS.ravel(), seed=3, prompts=list(prompts))
        alone = mean_of([math.fsum(values_S) / 4 for values_S in values_PS], seed=3)
        assert (found.count, found.prompts) == (28, 7)
        assert (found.mean, found.low, found.high) == (alone.mean, alone.low, alone.high)
        dependent = mean_of(values_PS.ravel(), seed=3)
        assert found.high - found.low > 1.5 * (dependent.high - dependent.low)
        assert found.text.endswith("n=28 of 7 prompts")

    def test_missing_seeds_leave_a_prompt_its_weight(self):
        values = [1.0, 3.0, math.nan, 10.0, math.nan, math.nan]
        found = mean_of(values, seed=0, prompts=["a", "a", "a", "b", "b", "c"])
        assert (found.mean, found.count, found.prompts, found.missing) == (6.0, 3, 2, 3)
        assert found.note == "2 prompts; an interval needs 5"

    def test_every_video_needs_a_prompt(self):
        with pytest.raises(ValueError):
            mean_of([1.0, 2.0], seed=0, prompts=["a"])

    def test_json_has_no_nan(self):
        for values in ([], [math.nan] * 6, [1.0] * 6, range(6)):
            json.dumps(mean_of(values, seed=0).as_dict(), allow_nan=False)

    def test_text(self):
        assert mean_of([0.5] * 6, seed=0).text == "0.5 [0.5, 0.5], n=6"
        assert mean_of([0.5, math.nan], seed=0).text == "0.5, n=1, 1 missing"
        assert mean_of([], seed=0).text == "no value, n=0"


class TestPairs:
    def test_interval_is_that_of_scipys_paired_bootstrap(self):
        rng = np.random.default_rng(7)
        first, second = rng.normal(size=(2, 15))
        order = np.argsort(first - second)
        expected = bootstrap(
            (first[order], second[order]),
            lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(11),
        ).confidence_interval
        found = compare_pairs(first, second, better="higher", seed=11).difference
        assert found.mean == pytest.approx(first.mean() - second.mean(), rel=1e-12)
        np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-9)

    def test_pairing_removes_what_the_videos_share(self):
        rng = np.random.default_rng(8)
        shared = rng.normal(0.0, 10.0, 30)
        first, second = shared + 1 + rng.normal(0, 0.1, 30), shared + rng.normal(0, 0.1, 30)
        found = compare_pairs(first, second, better="higher", seed=0).difference
        alone = mean_of(first, seed=0)
        assert 0.9 < found.low < 1.0 < found.high < 1.1
        assert alone.high - alone.low > 1.0

    @pytest.mark.parametrize(("better", "rate"), [("higher", 2.5 / 4), ("lower", 1.5 / 4)])
    def test_ties_count_half_and_missing_pairs_do_not_count(self, better, rate):
        found = compare_pairs(
            [1.0, 2.0, 3.0, 0.0, math.nan, 9.0],
            [0.0, 1.0, 3.0, 4.0, 1.0, math.nan],
            better=better,
            seed=0,
        )
        assert (found.win_rate, found.ties) == (rate, 1)
        assert (found.difference.count, found.difference.missing) == (4, 2)
        assert found.difference.low is None and "4 values" in found.difference.note

    def test_no_win_rate_without_a_better_direction_or_pairs(self):
        assert compare_pairs([1.0], [2.0], better=None, seed=0).win_rate is None
        assert compare_pairs([math.nan], [2.0], better="higher", seed=0).win_rate is None
        assert compare_pairs([], [], better="higher", seed=0).win_rate is None

    @settings(max_examples=20)
    @given(pairs=st.lists(st.tuples(finite, finite), max_size=10), seed=st.integers(0, 99))
    def test_swapping_sides_negates_the_difference_and_the_win_rate(self, pairs, seed):
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        found = compare_pairs(first, second, better="higher", seed=seed)
        swapped = compare_pairs(second, first, better="higher", seed=seed)
        other_direction = compare_pairs(second, first, better="lower", seed=seed)
        assert found.win_rate == other_direction.win_rate
        if pairs:
            assert found.difference.mean == -swapped.difference.mean
            assert found.win_rate + swapped.win_rate == pytest.approx(1.0)

    def test_refuses_sides_of_other_lengths(self):
        with pytest.raises(ValueError, match="got 2 and 1"):
            compare_pairs([1.0, 2.0], [1.0], better=None, seed=0)
