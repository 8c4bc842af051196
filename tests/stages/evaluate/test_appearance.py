"""Appearance scores against closed forms."""

import math

import numpy as np
import pytest

from stages.evaluate.appearance import APPEARANCE, appearance_scores


def scores_of(frames):
    found = appearance_scores(np.asarray(frames, np.uint8))
    assert list(found) == [score.name for score in APPEARANCE]
    for score in APPEARANCE:
        score.check(found[score.name])
    return found


def test_a_grey_video_has_brightness_alone():
    found = scores_of(np.full((3, 8, 12, 3), 51))
    assert found == pytest.approx(
        {
            "brightness": 0.2,
            "contrast": 0,
            "saturation": 0,
            "sharpness": 0,
            "frame_difference": 0,
        },
        abs=1e-12,
    )


def test_a_checkerboard_has_the_largest_contrast_and_sharpness():
    board = (np.indices((8, 12)).sum(axis=0) % 2 * 255)[..., None].repeat(3, axis=-1)
    found = scores_of([board, 255 - board])
    assert found == pytest.approx(
        {
            "brightness": 0.5,
            "contrast": 0.5,
            "saturation": 0,
            "sharpness": 1,
            "frame_difference": 1,
        }
    )


@pytest.mark.parametrize(("channel", "luma"), [(0, 0.2126), (1, 0.7152), (2, 0.0722)])
def test_pure_colours_are_saturated(channel, luma):
    frames = np.zeros((2, 4, 4, 3))
    frames[..., channel] = 255
    found = scores_of(frames)
    assert (found["saturation"], found["brightness"]) == pytest.approx((1, luma))


def test_washing_out_lowers_contrast_and_saturation():
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3))
    before, after = scores_of(frames), scores_of(128 + (frames - 128) // 2)
    for name in ("contrast", "saturation", "sharpness", "frame_difference"):
        assert after[name] == pytest.approx(before[name] / 2, rel=0.02)


def test_one_frame_has_no_difference():
    assert math.isnan(scores_of(np.zeros((1, 4, 4, 3)))["frame_difference"])
