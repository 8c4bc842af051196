"""Motion of sets of videos: features by hand, and distances that grow with the difference."""

import math

import numpy as np
import pytest
import torch

from stages.evaluate.motion import motion_distance, motion_features, motion_to_reference
from stages.video_scores.structure import SubjectTracks


def moving(offsets, *, fps=8.0, valid=None):
    """Tracks of a subject in the middle of 8x12 tokens that moves by one token per frame."""
    masks = np.zeros((len(offsets) + 1, 16, 24), bool)
    masks[:, 4:12, 6:18] = True
    similarities = torch.zeros(len(offsets), 8, 12, 9)
    similarities[..., 4] = 50.0
    for pair, (x, y) in enumerate(offsets):
        similarities[pair, 2:6, 3:9] = 0.0
        similarities[pair, 2:6, 3:9, 3 * (y + 1) + x + 1] = 50.0
    return SubjectTracks(
        forward_TMN=masks,
        backward_TMN=masks,
        valid_T=np.ones(len(masks), bool) if valid is None else np.array(valid),
        similarities_PHWK=similarities,
        fps=fps,
    )


def test_features_are_speeds_entropies_and_changes():
    found = motion_features(moving([(1, 0), (1, 0), (-1, 0)]), temperature=0.1)
    # 1 of 8 rows per frame at 8 frames/s; half of it for the tokens that the subject leaves.
    assert found[:5] == pytest.approx([0.5, 1, 1, 1, 1], rel=1e-6)
    assert found[5:10] == pytest.approx([0.0] * 5, abs=1e-6)
    assert found[10] == pytest.approx(0, abs=1e-6)  # the camera is still
    # The subject leaves one of its six columns.
    assert found[11] == pytest.approx((0 + 2) / 2 * (5 + 0.5) / 6, rel=1e-6)


def test_a_video_without_a_pair_has_no_features():
    found = motion_features(moving([(1, 0)], valid=[True, False]), temperature=0.1)
    assert np.isnan(found).all()


def test_distances_grow_with_the_difference():
    random = np.random.default_rng(0)
    real = random.normal(size=(60, 12))
    near, far = real[30:] + 0.5, real[30:] + 2.0
    same, small, large = (
        motion_distance(real[:30], other, seed=0).value for other in (real[30:], near, far)
    )
    assert same < small < large
    error = motion_distance(real[:30], real[30:], seed=0).standard_error
    assert abs(same) < 3 * error


def test_videos_without_features_are_left_out():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 12, 12))
    with_gap = np.concatenate([first, np.full((1, 12), math.nan)])
    assert motion_distance(with_gap, second, seed=0) == motion_distance(first, second, seed=0)


@pytest.mark.parametrize("count", [0, 9])
def test_too_few_videos_have_no_distance(count):
    found = motion_distance(np.zeros((count, 12)), np.zeros((20, 12)), seed=0)
    assert found.value is None
    assert found.note == f"{count} videos of a side have a track; a distance needs 10"


def test_a_distance_to_the_reference_is_in_its_units():
    random = np.random.default_rng(0)
    real, side = random.normal(size=(2, 30, 12))
    units, shift = random.uniform(0.1, 10, 12), random.normal(size=12)
    found = motion_to_reference(side, real, seed=0)
    scaled = motion_to_reference(units * side + shift, units * real + shift, seed=0)
    assert scaled.value == pytest.approx(found.value, rel=1e-9)
    # With x and y standardised by the reference: mean k(x, x') + mean k(y, y') - 2 mean k(x, y).
    x, y = ((one - real.mean(0)) / real.std(0) for one in (side, real))
    kernel = [[(a @ b / 12 + 1) ** 3 for b in (*x, *y)] for a in (*x, *y)]
    within = [
        np.mean([kernel[start + i][start + j] for i in range(30) for j in range(30) if i != j])
        for start in (0, 30)
    ]
    between = np.mean([kernel[i][30 + j] for i in range(30) for j in range(30)])
    assert found.value == pytest.approx(sum(within) - 2 * between, rel=1e-9)


def test_distances_to_a_reference_order_the_sides():
    random = np.random.default_rng(0)
    real = random.normal(size=(30, 12))
    sides = [random.normal(size=(30, 12)) + shift for shift in (0.0, 0.5, 2.0, 20.0)]
    found = [motion_to_reference(side, real, seed=0).value for side in sides]
    assert found == sorted(found)


def test_too_few_videos_or_clips_have_no_distance():
    found = motion_to_reference(np.zeros((0, 12)), np.zeros((20, 12)), seed=0)
    assert found.value is None
    assert found.note == "needs tracks of 10 videos and of as many reference clips, got 0 and 20"
