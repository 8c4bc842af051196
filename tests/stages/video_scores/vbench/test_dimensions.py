"""VBench's dimensions against loops of their formulas, and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from stages.video_scores.vbench.dimensions import (
    VBENCH,
    consistency,
    dynamic_degree,
    dynamic_frames,
    fastest_mean,
    frame_difference,
    is_static,
    smoothness,
)

SIZE = {"height": 480, "width": 720}
FAST = 11.25
"""6 pixels in frames whose shorter side is 256, in 480x720."""
FAST_STATIC = 5.625


def flickering(frames_THWC):
    return smoothness(
        np.array([frame_difference(*frames_THWC[[t, t + 1]]) for t in range(len(frames_THWC) - 1)])
    )


@given(frames=arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_flickering_is_vbenchs_formula_in_its_order_of_computation(frames):
    """One float32 mean per pair of frames, then the mean over pairs."""
    differences = [
        np.mean(np.abs(frames[t].astype(np.float32) - frames[t + 1].astype(np.float32)))
        for t in range(len(frames) - 1)
    ]
    if differences:
        expected = (255.0 - np.mean(np.array(differences)).item()) / 255.0
        assert flickering(frames) == pytest.approx(expected, abs=1e-6)
    else:
        assert math.isnan(flickering(frames))


def test_known_values_of_flickering():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    assert flickering(frames) == 1.0
    frames[1] = 255
    assert flickering(frames) == 0.0
    frames[1] = 51
    assert flickering(frames) == pytest.approx(0.8)
    frames[2] = 51
    assert flickering(frames) == pytest.approx(0.9)


class TestConsistency:
    @given(
        features=arrays(
            np.float64,
            array_shapes(min_dims=2, max_dims=2, max_side=6),
            elements=st.floats(-5, 5, width=16),
        )
    )
    def test_is_the_mean_of_both_similarities_frame_by_frame(self, features):
        def similarity(first, second):
            lengths = math.hypot(*first) * math.hypot(*second)
            return 0.0 if lengths == 0 else max(0.0, math.fsum(first * second) / lengths)

        steps = range(1, len(features))
        each = [
            (similarity(features[t - 1], features[t]) + similarity(features[0], features[t])) / 2
            for t in steps
        ]
        if not each:
            assert math.isnan(consistency(features))
        else:
            assert consistency(features) == pytest.approx(math.fsum(each) / len(each), abs=1e-6)

    def test_known_values(self):
        right, up, left = (1.0, 0.0), (0.0, 2.0), (-3.0, 0.0)
        assert consistency(np.array([right, right, right])) == pytest.approx(1)
        assert consistency(np.array([right, up, up])) == pytest.approx(0.25)
        assert consistency(np.array([right, left])) == 0, "opposite features count as unrelated"

    def test_does_not_depend_on_the_axes_of_the_features(self):
        features_TD = np.random.default_rng(0).normal(size=(5, 8))
        turn_DD, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
        assert consistency(features_TD @ turn_DD) == pytest.approx(consistency(features_TD))

    def test_is_unknown_where_a_feature_is(self):
        assert math.isnan(consistency(np.array([[1.0, 0.0], [math.nan, 0.0], [1.0, 0.0]])))


class TestFastestMean:
    @given(
        flow=arrays(
            np.float32, (2, 2, 7, 9), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
        ),
        fraction=st.sampled_from([0.05, 0.02, 0.5]),
    )
    def test_is_the_mean_of_the_largest_speeds(self, flow, fraction):
        expected = []
        for flow_2HW in flow.astype(np.float64):
            speeds = sorted(math.hypot(*vector) for vector in flow_2HW.reshape(2, -1).T)
            fastest = speeds[len(speeds) - int(7 * 9 * fraction) :]
            expected.append(math.fsum(fastest) / len(fastest))
        found = fastest_mean(torch.from_numpy(flow), fraction)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)

    def test_is_unknown_where_the_flow_is(self):
        flow_B2HW = torch.zeros(2, 2, 20, 20)
        flow_B2HW[1, 0, 3, 3] = math.nan
        first, second = fastest_mean(flow_B2HW, 0.05).tolist()
        assert first == 0
        assert math.isnan(second)


class TestDynamicDegree:
    @pytest.mark.parametrize(
        ("frames", "needed"), [(16, 4), (49, 12), (3, 1), (6, 2), (10, 2), (14, 4), (24, 6)]
    )
    def test_needs_a_quarter_of_the_frames(self, frames, needed):
        """In 10 frames 2.5 pairs, which rounds to the even number, as in 6 of 24."""
        speeds_P = np.zeros(frames - 1)
        speeds_P[: needed - 1] = FAST + 0.01
        assert dynamic_degree(speeds_P, **SIZE) == 0
        speeds_P[needed - 1] = FAST + 0.01
        assert dynamic_degree(speeds_P, **SIZE) == 1
        assert dynamic_degree(speeds_P[::-1], **SIZE) == 1, "whichever pairs they are"

    @pytest.mark.parametrize(("height", "width"), [(480, 720), (720, 480), (256, 256), (768, 1360)])
    def test_a_translation_is_fast_above_6_pixels_of_256(self, height, width):
        threshold = 6 * min(height, width) / 256
        for shift, expected in ((0.999, 0), (1.001, 1)):
            flow_B2HW = torch.zeros(15, 2, 40, 40)
            flow_B2HW[:, 0], flow_B2HW[:, 1] = 0.6 * shift * threshold, -0.8 * shift * threshold
            speeds_P = fastest_mean(flow_B2HW, 0.05).numpy()
            assert dynamic_degree(speeds_P, height=height, width=width) == expected

    def test_a_twentieth_of_the_pixels_is_enough(self):
        flow_B2HW = torch.zeros(15, 2, 40, 40)
        flow_B2HW[:, 0, :2] = 12.0
        assert dynamic_degree(fastest_mean(flow_B2HW, 0.05).numpy(), **SIZE) == 1
        flow_B2HW[:, 0, 0, :10] = 0
        assert dynamic_degree(fastest_mean(flow_B2HW, 0.05).numpy(), **SIZE) == 0

    def test_is_unknown_for_two_frames_and_where_a_speed_is(self):
        assert math.isnan(dynamic_degree(np.zeros(1), **SIZE))
        assert math.isnan(dynamic_degree(np.array([20.0, math.nan, 20.0, 20.0]), **SIZE))

    @pytest.mark.parametrize(
        ("fps", "step"), [(8, 1), (11.9, 1), (12.1, 2), (16, 2), (20, 2), (24, 3), (30, 4), (5, 1)]
    )
    def test_looks_at_about_8_frames_per_second(self, fps, step):
        assert list(dynamic_frames(range(3, 20), fps)) == list(range(3, 20, step))


class TestStaticFilter:
    def test_a_still_video_is_static(self):
        assert is_static(np.zeros(15), 0.0, 0.0, **SIZE)

    def test_an_eighth_of_the_frames_may_move(self):
        speeds_P = np.zeros(15)
        speeds_P[[3, 9]] = FAST_STATIC + 0.01
        assert is_static(speeds_P, 0.0, 0.0, **SIZE)
        speeds_P[0] = FAST_STATIC + 0.01
        assert not is_static(speeds_P, 0.0, 0.0, **SIZE)

    @pytest.mark.parametrize("end", [0, 1])
    def test_slow_drift_shows_from_end_to_end(self, end):
        """Of 16 frames two pairs may move, so that the ends may be four times as far apart."""
        speeds_P, ends = np.full(15, 1.0), [0.0, 0.0]
        ends[end] = 4 * FAST_STATIC - 0.01
        assert is_static(speeds_P, *ends, **SIZE)
        ends[end] = 4 * FAST_STATIC + 0.01
        assert not is_static(speeds_P, *ends, **SIZE)

    def test_what_is_unknown_is_not_static(self):
        assert not is_static(np.array([0.0, math.nan, 0.0]), 0.0, 0.0, **SIZE)
        assert not is_static(np.zeros(15), 0.0, math.nan, **SIZE)
        assert not is_static(np.zeros(15), math.nan, 0.0, **SIZE)


def test_the_dimensions_have_vbenchs_names():
    assert [score.name for score in VBENCH] == [
        "subject_consistency",
        "background_consistency",
        "temporal_flickering",
        "motion_smoothness",
        "dynamic_degree",
    ]
