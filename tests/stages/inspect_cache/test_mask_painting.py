import numpy as np
import pytest

from stages.clips import SubjectPrompt
from stages.inspect_cache.mask_painting import (
    checkerboard,
    draw_outline,
    draw_prompt,
    outline,
    resized_mask,
    tint,
)

COLOUR = (10, 200, 30)


def square(height, width, top, left, bottom, right):
    mask_HW = np.zeros((height, width), bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW


def test_a_stored_mask_covers_the_same_share_of_the_picture():
    stored_hw = square(10, 20, 2, 5, 8, 15).astype(np.uint8) * 255
    mask_HW = resized_mask(stored_hw, (80, 40))
    assert (mask_HW == square(40, 80, 8, 20, 32, 60)).mean() > 0.98
    assert not mask_HW[0, 0]
    assert mask_HW[20, 40]


def test_a_pixel_is_in_from_a_half_on():
    assert resized_mask(np.array([[127, 128]], np.uint8), (2, 1)).tolist() == [[False, True]]


def test_an_outline_is_the_pixels_near_the_outside_by_loop():
    mask_HW = np.random.default_rng(0).random((12, 15)) > 0.2
    expected = np.zeros_like(mask_HW)
    for y, x in zip(*np.nonzero(mask_HW), strict=True):
        near = mask_HW[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        expected[y, x] = not near.all()
    assert (outline(mask_HW, 2) == expected).all()


def test_the_frames_edge_is_no_outline():
    assert not outline(np.ones((6, 6), bool), 1).any()


def test_a_tint_mixes_inside_and_leaves_the_rest():
    image_HW3 = np.full((4, 4, 3), 100, np.uint8)
    painted = tint(image_HW3, square(4, 4, 0, 0, 2, 4), (200, 0, 100), 0.25)
    assert (painted[:2] == (125, 75, 100)).all()
    assert (painted[2:] == 100).all()
    assert (image_HW3 == 100).all()


def test_an_outline_has_its_colour_and_a_rim():
    painted = draw_outline(np.full((9, 9, 3), 100, np.uint8), square(9, 9, 2, 2, 7, 7), COLOUR, 1)
    assert (painted[2, 2:7] == COLOUR).all()
    assert (painted[1, 2:7] == 40).all()
    assert (painted[3:6, 3:6] == 100).all()
    assert (painted[0] == 100).all()


@pytest.mark.parametrize(
    ("prompt", "coloured", "untouched"),
    [
        (SubjectPrompt(box_xyxy=(5.0, 4.0, 20.0, 15.0)), (8, 20), (20, 20)),
        (SubjectPrompt(box_xyxy=(-50.0, 4.0, 500.0, 15.0)), (8, 20), (20, 20)),
        (
            SubjectPrompt(points_xy=np.array([[10.0, 5.0]]), point_labels=np.array([1])),
            (10, 20),
            (30, 50),
        ),
        (SubjectPrompt(mask_HW=square(20, 30, 5, 5, 15, 25)), (10, 20), (20, 30)),
    ],
    ids=["box", "box beyond the frame", "point", "mask"],
)
def test_a_prompt_stands_where_it_points_to_at_the_shown_size(prompt, coloured, untouched):
    """A training frame of 20x30 is shown at twice its size."""
    image_HW3 = np.full((40, 60, 3), 90, np.uint8)
    painted = draw_prompt(image_HW3, prompt, COLOUR, scale=(2.0, 2.0), thickness=1)
    assert (painted[coloured] == COLOUR).all()
    assert (painted[untouched] == 90).all()


def test_a_point_off_the_subject_has_no_colour():
    prompt = SubjectPrompt(
        points_xy=np.array([[10.0, 5.0], [25.0, 15.0]]), point_labels=np.array([0, 1])
    )
    image_HW3 = np.full((40, 60, 3), 90, np.uint8)
    painted = draw_prompt(image_HW3, prompt, COLOUR, scale=(2.0, 2.0), thickness=1)
    assert (painted[30, 50] == COLOUR).all()
    assert (painted[10, 20] == 0).all()


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, -1), (3, 1)])
def test_a_line_in_any_direction_meets_both_kinds_of_checks(step):
    checked_HW = checkerboard((213, 320), 6)
    assert abs(checked_HW.mean() - 0.5) < 0.05
    for start in range(60, 150, 7):
        x_N = np.clip(start + step[1] * np.arange(60), 0, 319)
        y_N = np.clip(start + step[0] * np.arange(60), 0, 212)
        assert 0.2 < checked_HW[y_N, x_N].mean() < 0.8
