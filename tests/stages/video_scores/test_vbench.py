"""VBench's temporal flickering against its own formula, and the form of its result file."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from stages.video_scores.vbench import results_json, vbench_scores


def flickering(frames_THWC):
    return vbench_scores(frames_THWC)["temporal_flickering"]


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


def test_the_result_file_has_vbenchs_form():
    videos = {"v/a-0.mp4": 0.5, "v/ü-1.mp4": 1.0, "v/broken-0.mp4": math.nan}
    text = results_json({"temporal_flickering": videos, "none": {"v/a-0.mp4": math.nan}})
    assert json.loads(text) == {
        "temporal_flickering": [
            0.75,
            [
                {"video_path": "v/a-0.mp4", "video_results": 0.5},
                {"video_path": "v/ü-1.mp4", "video_results": 1.0},
            ],
        ]
    }
