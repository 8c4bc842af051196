"""Selection of the subject among mask proposals, on hand-drawn masks and motions."""

import numpy as np
import pytest
import torch

from stages.extract_features.prompts.camera_motion import OwnMotion
from stages.extract_features.prompts.salience import (
    Candidates,
    choose_subject,
    select_candidates,
)

SIDE = 64
Box = tuple[int, int, int, int]


def logits_of(*boxes: Box, height: float = 10.0) -> torch.Tensor:
    """[N, S, S], positive inside x0, y0, x1, y1."""
    logits_NSS = torch.full((len(boxes), SIDE, SIDE), -height)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        logits_NSS[number, y0:y1, x0:x1] = height
    return logits_NSS


def candidates_of(*boxes: Box) -> Candidates:
    candidates = select_candidates(logits_of(*boxes), torch.full((len(boxes),), 0.9))
    assert len(candidates) == len(boxes)
    return candidates


def box_of(candidates: Candidates, index: int) -> Box:
    y, x = np.nonzero(candidates.logits_NSS[index].numpy() > 0)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def sure(speed_HW: np.ndarray) -> OwnMotion:
    return OwnMotion(speed_HW=speed_HW, certainty_HW=np.ones_like(speed_HW))


def chosen_box(candidates: Candidates, speed_HW: np.ndarray) -> Box:
    return box_of(candidates, choose_subject(candidates, sure(speed_HW)).index)


def test_masks_that_sam2_doubts_are_no_candidates() -> None:
    boxes = [(10, 10, 20, 20), (30, 30, 50, 50)]
    kept = select_candidates(logits_of(*boxes), torch.tensor([0.69, 0.71]))
    assert [box_of(kept, 0)] == boxes[1:]


def test_masks_that_change_with_the_threshold_are_no_candidates() -> None:
    logits_NSS = logits_of((10, 10, 30, 30), (34, 34, 54, 54))
    logits_NSS[0, 10:30, 26:30] = 0.5  # a fifth of it is positive, but not above +1
    kept = select_candidates(logits_NSS, torch.tensor([0.9, 0.9]))
    assert len(kept) == 1
    assert box_of(kept, 0) == (34, 34, 54, 54)
    assert kept.stability_N.tolist() == [1.0]


@pytest.mark.parametrize("box", [(10, 10, 14, 14), (2, 2, 62, 62)], ids=["speck", "everything"])
def test_specks_and_whole_frames_are_no_candidates(box: Box) -> None:
    assert len(select_candidates(logits_of(box), torch.tensor([0.9]))) == 0


def test_of_near_duplicates_the_best_one_stays() -> None:
    boxes = [(10, 10, 30, 30), (10, 10, 30, 31), (20, 10, 40, 30)]
    kept = select_candidates(logits_of(*boxes), torch.tensor([0.8, 0.9, 0.7]))
    assert [box_of(kept, index) for index in range(len(kept))] == [boxes[1], boxes[2]]


def test_what_lines_the_border_has_less_quality() -> None:
    kept = select_candidates(
        logits_of((0, 0, SIDE, 20), (20, 30, 40, 50)), torch.tensor([0.95, 0.9])
    )
    assert box_of(kept, 0) == (20, 30, 40, 50)
    border = (SIDE + 2 * 19) / (4 * SIDE - 4)
    np.testing.assert_allclose(kept.quality_N, [0.9, 0.95 * (1 - border)], rtol=1e-6)


def test_the_moving_one_wins_over_the_bigger_and_more_central_one() -> None:
    candidates = candidates_of((20, 20, 44, 44), (4, 50, 14, 60))
    speed_HW = np.full((SIDE, SIDE), 0.01)
    speed_HW[50:60, 4:14] = 0.4
    assert chosen_box(candidates, speed_HW) == (4, 50, 14, 60)
    assert choose_subject(candidates, sure(speed_HW)).moves


@pytest.mark.parametrize("grid", [64, 32, 16])
def test_the_whole_body_wins_over_its_parts_and_over_a_mask_too_wide(grid: int) -> None:
    whole, part, wide = (20, 20, 44, 44), (20, 20, 44, 30), (8, 8, 56, 56)
    candidates = candidates_of(part, whole, wide)
    scale = grid // 16
    speed_HW = np.zeros((grid, grid))
    speed_HW[5 * scale : 11 * scale, 5 * scale : 11 * scale] = 0.5
    assert chosen_box(candidates, speed_HW) == whole


def test_of_two_alike_the_one_with_more_of_the_motion_wins() -> None:
    small, big = (6, 6, 14, 14), (30, 30, 54, 54)
    candidates = candidates_of(small, big)
    speed_HW = np.zeros((SIDE, SIDE))
    speed_HW[6:14, 6:14] = speed_HW[30:54, 30:54] = 0.5
    assert chosen_box(candidates, speed_HW) == big


def test_the_score_is_the_documented_product() -> None:
    box = (20, 20, 44, 44)
    candidates = candidates_of(box)
    speed_HW = np.full((SIDE, SIDE), 0.1)
    speed_HW[20:44, 20:44] = 0.5
    speed_HW[0, 0] = 2.0
    choice = choose_subject(candidates, sure(speed_HW))
    contrast = 0.4 / (0.5 + 0.1 + 0.05)
    share = 24 * 24 * 0.4 / (24 * 24 * 0.4 + 1.9)
    assert choice.score == pytest.approx(0.9 * contrast * share**0.5, rel=1e-6)
    assert choice.speed == pytest.approx(0.4)


def test_when_nothing_moves_the_big_central_one_wins() -> None:
    candidates = candidates_of((2, 2, 22, 22), (22, 22, 42, 42), (28, 50, 36, 58))
    choice = choose_subject(candidates, sure(np.full((SIDE, SIDE), 0.02)))
    assert box_of(candidates, choice.index) == (22, 22, 42, 42)
    assert not choice.moves
    assert choice.score == pytest.approx(0.9 * (400 / SIDE**2 / 0.6) ** 0.5, rel=1e-6)


def test_a_plain_body_has_the_speed_of_its_outline() -> None:
    candidates = candidates_of((20, 20, 44, 44))
    speed_HW, certainty_HW = np.zeros((SIDE, SIDE)), np.ones((SIDE, SIDE))
    speed_HW[20:44, 20:44] = 0.5
    speed_HW[22:42, 22:42] = certainty_HW[22:42, 22:42] = 0.0
    choice = choose_subject(candidates, OwnMotion(speed_HW=speed_HW, certainty_HW=certainty_HW))
    assert choice.speed == pytest.approx(0.5)


def test_ties_go_to_the_first() -> None:
    candidates = candidates_of((8, 24, 24, 40), (40, 24, 56, 40))
    choice = choose_subject(candidates, sure(np.zeros((SIDE, SIDE))))
    assert choice.index == 0


def test_scores_are_shares() -> None:
    noise = np.random.default_rng(0)
    for _ in range(20):
        corners = noise.integers(0, 48, (6, 2))
        boxes = [(int(x), int(y), int(x) + 12, int(y) + 12) for x, y in corners]
        candidates = select_candidates(logits_of(*boxes), torch.rand(6) * 0.3 + 0.7)
        speed_HW = noise.exponential(noise.choice([0.01, 1.0]), (SIDE, SIDE))
        assert 0 <= choose_subject(candidates, sure(speed_HW)).score <= 1
