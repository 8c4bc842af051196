"""Structure scores against closed forms: rigid motion scores best, broken subjects do not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.video_scores.structure import STRUCTURE, SubjectTracks, iou, structure_scores

# Legend: T frame, M N mask pixels, H W token grid, K neighbour.


def ellipse(y, x, *, axes=(14, 8), turn=0.0, size=(64, 96)):
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    dx, dy = columns - x, rows - y
    along = (dx * math.cos(turn) + dy * math.sin(turn)) / axes[0]
    across = (-dx * math.sin(turn) + dy * math.cos(turn)) / axes[1]
    return along**2 + across**2 <= 1


def flow_of(offset_xy, *, pairs, grid=(8, 12), radius=1, sharpness=5.0):
    """Similarities with one neighbour above the others: the token moves by `offset_xy`."""
    side = 2 * radius + 1
    similarities = torch.zeros(pairs, *grid, side * side, dtype=torch.float64)
    similarities[..., (offset_xy[1] + radius) * side + offset_xy[0] + radius] = sharpness
    return similarities


def tracks_of(masks, *, backward=None, valid=None, similarities=None, fps=8.0):
    masks = np.stack(masks)
    return SubjectTracks(
        forward_TMN=masks,
        backward_TMN=masks if backward is None else np.stack(backward),
        valid_T=np.ones(len(masks), bool) if valid is None else np.array(valid),
        similarities_PHWK=flow_of((0, 0), pairs=len(masks) - 1)
        if similarities is None
        else similarities,
        fps=fps,
    )


def scores_of(tracks):
    found = structure_scores(tracks, temperature=0.1)
    assert list(found) == [score.name for score in STRUCTURE]
    for score in STRUCTURE:
        score.check(found[score.name])
    return found


def test_a_rigid_motion_is_stable():
    growing = [
        ellipse(32, 30 + 3 * t, axes=(14 * 1.02**t, 8 * 1.02**t), turn=0.1 * t) for t in range(9)
    ]
    found = scores_of(tracks_of(growing))
    assert found["subject_kept"] == found["cycle_consistency"] == 1
    # The outline of about 70 pixels around 350 is drawn anew on the grid in each frame.
    assert found["shape_stability"] > 0.93
    assert found["area_jitter"] < 0.03


def test_a_melting_subject_is_less_stable_the_more_it_melts():
    def melting(amount):
        random = np.random.default_rng(0)
        return tracks_of(
            [
                ellipse(32, 40 + 2 * t, axes=14 * np.exp(amount * random.normal(size=2) / 2))
                for t in range(9)
            ]
        )

    found = [scores_of(melting(amount)) for amount in (0.0, 0.2, 0.5, 1.0)]
    shapes = [one["shape_stability"] for one in found]
    jitters = [one["area_jitter"] for one in found]
    assert shapes == sorted(shapes, reverse=True)
    assert jitters == sorted(jitters)


@pytest.mark.parametrize("turn", [-0.3, 0.0, 0.1, 0.3])
@pytest.mark.parametrize("scale", [0.9, 1.0, 1.15])
def test_shift_scale_and_rotation_do_not_count(turn, scale):
    before = ellipse(30, 40, turn=0.4)
    after = ellipse(34, 52, axes=(14 * scale, 8 * scale), turn=0.4 + turn)
    assert scores_of(tracks_of([before, after]))["shape_stability"] > 0.92


def test_a_lost_half_is_seen():
    whole = ellipse(32, 48)
    half = whole & (np.arange(96) < 48)
    found = scores_of(tracks_of([whole, whole, half, half]))
    assert found["shape_stability"] < (1 + 1 + 0.85) / 3
    # The area is halved once: second differences of log area are log 2 twice.
    assert found["area_jitter"] == pytest.approx(math.log(whole.sum() / half.sum()), rel=1e-12)


def test_frames_without_the_subject_are_left_out():
    masks = [ellipse(32, 40)] * 6
    masks[2] = np.zeros_like(masks[0])
    found = scores_of(tracks_of(masks, valid=[True, True, False, True, True, True]))
    assert found["subject_kept"] == pytest.approx(5 / 6)
    assert found["shape_stability"] == found["cycle_consistency"] == 1
    assert found["area_jitter"] == 0


def test_a_subject_that_is_never_seen_has_no_scores():
    found = scores_of(tracks_of([np.zeros((64, 96), bool)] * 4, valid=[False] * 4))
    assert found.pop("subject_kept") == 0
    assert all(math.isnan(value) for value in found.values())


def test_without_a_backward_track_there_is_no_consistency():
    masks = np.stack([ellipse(32, 40)] * 3)
    tracks = SubjectTracks(
        forward_TMN=masks,
        backward_TMN=None,
        valid_T=np.ones(3, bool),
        similarities_PHWK=flow_of((0, 0), pairs=2),
        fps=8.0,
    )
    assert math.isnan(scores_of(tracks)["cycle_consistency"])


def test_disagreeing_tracks_are_inconsistent():
    forward = [ellipse(32, 40)] * 3
    backward = [ellipse(32, 40), ellipse(32, 46), ellipse(32, 90)]
    expected = np.mean([iou(*pair) for pair in zip(forward, backward, strict=True)])
    found = scores_of(tracks_of(forward, backward=backward))
    assert found["cycle_consistency"] == pytest.approx(expected)


@pytest.mark.parametrize(("offset", "length"), [((1, 0), 1), ((0, -1), 1), ((1, 1), math.sqrt(2))])
def test_speed_is_relative_to_the_camera(offset, length):
    masks = [ellipse(32, 48)] * 4
    everywhere = flow_of(offset, pairs=3, sharpness=50.0)
    panning = scores_of(tracks_of(masks, similarities=everywhere))
    # 8 rows of tokens, 8 frames per second. Beside the frame's edge the flow is balanced.
    assert panning["camera_motion"] == pytest.approx(length, rel=1e-6)
    assert panning["subject_motion"] == pytest.approx(0, abs=1e-9)
    on_subject = flow_of((0, 0), pairs=3, sharpness=50.0)
    on_subject[:, 2:6, 3:9] = everywhere[:, 2:6, 3:9]
    walking = scores_of(tracks_of(masks, similarities=on_subject))
    assert walking["camera_motion"] == pytest.approx(0, abs=1e-9)
    assert walking["subject_motion"] == pytest.approx(length, rel=1e-6)
    faster = scores_of(tracks_of(masks, similarities=on_subject, fps=16.0))
    assert faster["subject_motion"] == pytest.approx(2 * length, rel=1e-6)


def test_entropy_is_that_of_a_loop():
    random = np.random.default_rng(1)
    similarities = torch.from_numpy(random.uniform(-1, 1, (2, 8, 12, 9)))
    masks = [ellipse(32, 48, axes=(60, 60))] * 3
    values = []
    for pair in range(2):
        for y in range(8):
            for x in range(12):
                rows = masks[pair][8 * y : 8 * y + 8, 8 * x : 8 * x + 8].nonzero()[0]
                if len(rows) < 32:
                    continue
                weights = [
                    math.exp(similarities[pair, y, x, 3 * dy + dx].item() / 0.1)
                    for dy in range(3)
                    for dx in range(3)
                    if 0 <= y + dy - 1 < 8 and 0 <= x + dx - 1 < 12
                ]
                shares = [weight / sum(weights) for weight in weights]
                entropy = -sum(share * math.log(share) for share in shares)
                values.append((pair, entropy / math.log(len(shares))))
    expected = np.mean([np.mean([v for p, v in values if p == pair]) for pair in range(2)])
    found = scores_of(tracks_of(masks, similarities=similarities))
    assert found["flow_entropy"] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_any_tracks_have_scores_in_range(seed, num_frames):
    random = np.random.default_rng(seed)
    shape = (num_frames, 16, 24)
    tracks = SubjectTracks(
        forward_TMN=random.random(shape) < random.random(),
        backward_TMN=random.random(shape) < random.random(),
        valid_T=random.random(num_frames) < 0.7,
        similarities_PHWK=torch.from_numpy(random.uniform(-1, 1, (num_frames - 1, 4, 6, 9))),
        fps=8.0,
    )
    scores_of(tracks)
