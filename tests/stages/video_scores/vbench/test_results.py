"""The form of VBench's files, and its normalisation against the constants of its scripts."""

import json
import math

import pytest

from stages.video_scores.vbench.results import five_dimension_mean, full_info_json, results_json

# Vchitect/VBench at 45e79ec, scripts/constant.py: minimum, maximum, weight.
CONSTANTS = {
    "subject_consistency": (0.1462, 1.0, 1),
    "background_consistency": (0.2615, 1.0, 1),
    "temporal_flickering": (0.6293, 1.0, 1),
    "motion_smoothness": (0.706, 0.9975, 1),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
MEANS = {
    "subject_consistency": 0.9645,
    "background_consistency": 0.9671,
    "temporal_flickering": 0.9897,
    "motion_smoothness": 0.9773,
    "dynamic_degree": 0.6278,
}


def test_the_mean_is_weighted_after_normalisation():
    expected, weights = 0.0, 0.0
    for name, (low, high, weight) in CONSTANTS.items():
        expected += weight * (MEANS[name] - low) / (high - low)
        weights += weight
    assert weights == 4.5
    assert five_dimension_mean(MEANS) == pytest.approx(expected / 4.5, rel=1e-12)


def test_the_ends_of_the_normalisation_are_0_and_1():
    lows = {name: low for name, (low, _, _) in CONSTANTS.items()}
    highs = {name: high for name, (_, high, _) in CONSTANTS.items()}
    assert five_dimension_mean(lows) == pytest.approx(0, abs=1e-12)
    assert five_dimension_mean(highs) == pytest.approx(1)
    assert five_dimension_mean(lows | {"dynamic_degree": 1.0}) == pytest.approx(0.5 / 4.5)
    assert five_dimension_mean(highs | {"motion_smoothness": 1.0}) > 1, "VBench does not clip"


@pytest.mark.parametrize("name", CONSTANTS)
def test_there_is_no_mean_without_all_five(name):
    others = {other: value for other, value in MEANS.items() if other != name}
    assert math.isnan(five_dimension_mean(others))
    assert math.isnan(five_dimension_mean(MEANS | {name: math.nan}))


def test_the_result_file_has_vbenchs_form():
    videos = {"v/a-0.mp4": 0.5, "v/ü-1.mp4": 1.0, "v/broken-0.mp4": math.nan}
    dimensions = {"temporal_flickering": videos, "none": {"v/a-0.mp4": math.nan}}
    assert json.loads(results_json(dimensions, "VBench")) == {
        "temporal_flickering": [
            0.75,
            [
                {"video_path": "v/a-0.mp4", "video_results": 0.5},
                {"video_path": "v/ü-1.mp4", "video_results": 1.0},
            ],
        ]
    }


def test_dynamic_degree_is_a_truth_value_in_vbench_and_a_fraction_in_vbench_long():
    dimensions = {"dynamic_degree": {"a": 1.0, "b": 0.0}}
    mean, rows = json.loads(results_json(dimensions, "VBench"))["dynamic_degree"]
    assert mean == 0.5
    assert [row["video_results"] for row in rows] == [True, False]
    assert [type(row["video_results"]) for row in rows] == [bool, bool]
    _, rows = json.loads(results_json(dimensions, "VBench-Long"))["dynamic_degree"]
    assert [type(row["video_results"]) for row in rows] == [float, float]


def test_the_info_file_lists_the_videos_of_each_prompt():
    videos = [("v/a dog-0.mp4", "a dog"), ("v/a cat-0.mp4", "a cat"), ("v/a dog-1.mp4", "a dog")]
    info = full_info_json(videos, ["dynamic_degree"])
    assert info is not None
    assert json.loads(info) == [
        {
            "prompt_en": "a dog",
            "dimension": ["dynamic_degree"],
            "video_list": ["v/a dog-0.mp4", "v/a dog-1.mp4"],
        },
        {"prompt_en": "a cat", "dimension": ["dynamic_degree"], "video_list": ["v/a cat-0.mp4"]},
    ]


def test_there_is_no_info_file_with_an_unknown_prompt():
    assert full_info_json([("v/a.mp4", "a dog"), ("v/b.mp4", None)], ["dynamic_degree"]) is None
