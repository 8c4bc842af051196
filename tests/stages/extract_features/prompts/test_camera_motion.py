"""Motion relative to the camera, on feature maps with known motion."""

import numpy as np
import pytest
import torch

from stages.extract_features.prompts.camera_motion import (
    RADIUS,
    fit_affine,
    own_motion,
    weighted_median,
)

SIDE, CHANNELS, MARGIN = 40, 16, 40
GAPS = (1, 2, 3)


@pytest.fixture
def world() -> torch.Tensor:
    """A texture larger than the frame: features [H, W, C] without order."""
    noise = torch.Generator().manual_seed(0)
    return torch.randn(SIDE + 2 * MARGIN, SIDE + 2 * MARGIN, CHANNELS, generator=noise)


def seen_by_camera(world: torch.Tensor, pan: tuple[int, int], frame: int) -> torch.Tensor:
    """The part of the world in frame: its content moves by `pan` (dx, dy) tokens a frame."""
    dx, dy = pan[0] * frame, pan[1] * frame
    return world[MARGIN - dy : MARGIN - dy + SIDE, MARGIN - dx : MARGIN - dx + SIDE].clone()


def with_square(frame_HWC: torch.Tensor, x: int, y: int, side: int = 8) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    frame_HWC[y : y + side, x : x + side] = torch.randn(side, side, CHANNELS, generator=noise)
    return frame_HWC


def speeds(frames: list[torch.Tensor], gaps: tuple[int, ...] = GAPS) -> np.ndarray:
    return own_motion(frames[0], torch.stack(frames[1:]), gaps).speed_HW


@pytest.mark.parametrize("pan", [(0, 0), (1, 0), (-1, 1)])
def test_a_square_moves_by_itself_whatever_the_camera_does(
    world: torch.Tensor, pan: tuple[int, int]
) -> None:
    frames = [
        with_square(seen_by_camera(world, pan, t), 15 + (pan[0] + 1) * t, 12 + pan[1] * t)
        for t in (0, *GAPS)
    ]
    speed_HW = speeds(frames)
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    inside[12:20, 15:23] = True
    np.testing.assert_allclose(speed_HW[inside], 1.0, atol=0.05)
    # What the square covers later on is matched with something else.
    elsewhere = ~inside
    elsewhere[12:20, 23:26] = False
    assert np.quantile(speed_HW[elsewhere], 0.9) < 0.02


def test_a_pan_alone_moves_nothing(world: torch.Tensor) -> None:
    frames = [seen_by_camera(world, (1, -1), t) for t in (0, *GAPS)]
    np.testing.assert_allclose(speeds(frames), 0.0, atol=0.02)


def test_a_pan_out_of_the_window_does_not_count(world: torch.Tensor) -> None:
    pan = (3, 0)
    near = [seen_by_camera(world, pan, t) for t in (0, 1)]
    assert pan[0] * 4 > RADIUS
    far = [*near, seen_by_camera(world, pan, 4)]
    np.testing.assert_allclose(speeds(far, (1, 4)), speeds(near, (1,)), atol=1e-7)


def test_plain_surfaces_stand_still(world: torch.Tensor) -> None:
    frames = [seen_by_camera(world, (1, 0), t) for t in (0, *GAPS)]
    for frame_HWC in frames:
        frame_HWC[8:32, 8:32] = 1.0  # does not show whether it pans
    motion = own_motion(frames[0], torch.stack(frames[1:]), GAPS)
    assert motion.speed_HW[16:24, 16:24].max() < 0.02
    assert motion.certainty_HW[16:24, 16:24].max() < 0.1 < 0.9 < motion.certainty_HW[3, 3]
    assert motion.certainty_HW[3, -1] == 0  # pans out of the picture


def test_the_fit_recovers_pan_zoom_and_roll_among_outliers() -> None:
    noise = np.random.default_rng(0)
    y_HW, x_HW = np.mgrid[:30, :40].astype(float)
    tokens_HW2 = np.stack([x_HW, y_HW], axis=-1)
    expected_HW2 = np.stack(
        [1.5 + 0.02 * x_HW - 0.03 * y_HW, -0.5 + 0.03 * x_HW + 0.02 * y_HW], axis=-1
    )
    flow_HW2 = expected_HW2 + 0.01 * noise.standard_normal(expected_HW2.shape)
    flow_HW2[5:25, 10:30] += (4.0, -3.0)  # a third of the frame moves by itself
    flow_HW2[:, 36:] = noise.uniform(-6, 6, (30, 4, 2))
    found_HW2 = fit_affine(tokens_HW2, flow_HW2, np.ones((30, 40)))
    np.testing.assert_allclose(found_HW2, expected_HW2, atol=0.02)


def test_the_fit_is_that_of_least_squares_without_outliers() -> None:
    noise = np.random.default_rng(1)
    y_HW, x_HW = np.mgrid[:8, :9].astype(float)
    tokens_HW2 = np.stack([x_HW, y_HW], axis=-1)
    flow_HW2 = np.stack([1 + 0.1 * x_HW, 2 - 0.05 * y_HW], axis=-1)
    weights_HW = noise.uniform(0.1, 1, (8, 9))
    np.testing.assert_allclose(fit_affine(tokens_HW2, flow_HW2, weights_HW), flow_HW2, atol=1e-6)


def test_tokens_without_weight_do_not_count_in_the_fit() -> None:
    y_HW, x_HW = np.mgrid[:10, :10].astype(float)
    tokens_HW2 = np.stack([x_HW, y_HW], axis=-1)
    flow_HW2 = np.zeros((10, 10, 2))
    flow_HW2[:, 3:] = 5.0
    weights_HW = np.zeros((10, 10))
    weights_HW[:, :3] = 1.0
    np.testing.assert_allclose(fit_affine(tokens_HW2, flow_HW2, weights_HW), 0.0, atol=1e-6)


def test_the_weighted_median_is_that_of_repeated_values() -> None:
    noise = np.random.default_rng(2)
    values, counts = noise.standard_normal(21), noise.integers(0, 9, 21)
    repeated = np.sort(np.repeat(values, counts))
    expected = repeated[(len(repeated) - 1) // 2]
    assert weighted_median(values, counts.astype(float)) == expected
    assert weighted_median(values, np.zeros(21)) == 0.0
