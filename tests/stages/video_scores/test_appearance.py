"""Appearance scores against closed forms."""

import math

import numpy as np
import pytest

from stages.video_scores.appearance import APPEARANCE, appearance_scores, washed_out


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


BASE = {"contrast": 0.2, "saturation": 0.3, "sharpness": 0.1, "frame_difference": 0.05}


class TestWashedOut:
    @pytest.mark.parametrize("name", ["contrast", "saturation", "sharpness"])
    def test_a_fall_by_a_fifth_is_reported(self, name):
        now = BASE | {name: 0.79 * BASE[name]}
        (found,) = washed_out(now, BASE)
        assert found.startswith(f"{name} {BASE[name]:g} -> ")
        assert not washed_out(BASE | {name: 0.81 * BASE[name]}, BASE)

    def test_a_rise_or_another_score_is_not(self):
        now = {name: 3 * value for name, value in BASE.items()} | {"frame_difference": 0.0}
        assert not washed_out(now, BASE)

    @pytest.mark.parametrize(
        ("now", "before"),
        [({}, BASE), (BASE, {}), ({"contrast": math.nan}, BASE), (BASE, {"contrast": math.nan})],
    )
    def test_what_is_unknown_is_not(self, now, before):
        assert not washed_out(now, before)

    def test_a_base_without_colour_cannot_lose_it(self):
        assert not washed_out({"saturation": 0.0}, {"saturation": 0.0})

    def test_a_video_that_is_blurred_and_greyed_is(self):
        rng = np.random.default_rng(0)
        frames_THWC = rng.integers(0, 255, (3, 16, 24, 3), dtype=np.uint8)
        grey_THWC = (frames_THWC.mean(axis=(1, 2, 3), keepdims=True) + frames_THWC) / 2
        faded = washed_out(
            appearance_scores(grey_THWC.astype(np.uint8)), appearance_scores(frames_THWC)
        )
        assert [text.split()[0] for text in faded] == ["contrast", "saturation", "sharpness"]
