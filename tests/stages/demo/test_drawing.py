import numpy as np
import pytest

from stages.demo.drawing import capsule_coverage, scrolled, smooth_noise


@pytest.mark.parametrize(
    ("start", "end"), [((20.3, 11.0), (41.7, 30.2)), ((30.0, 20.0), (30.0, 20.0)), ((3, 3), (9, 3))]
)
def test_coverage_sums_to_the_area_of_the_capsule(start, end):
    start, end = np.array(start, float), np.array(end, float)
    radius = 2.5
    _, coverage, _ = capsule_coverage(start, end, radius, height=48, width=64)
    area = np.pi * radius**2 + 2 * radius * np.hypot(*(end - start))
    assert coverage.sum() == pytest.approx(area, rel=0.02)


def test_coverage_equals_a_supersampled_capsule():
    start, end, radius, fine = np.array([8.2, 20.7]), np.array([25.4, 9.1]), 4.3, 16
    window, coverage, _ = capsule_coverage(start, end, radius, height=32, width=40)
    y, x = (np.mgrid[0 : 32 * fine, 0 : 40 * fine] + 0.5) / fine
    points = np.stack([x, y], axis=-1) - start
    axis = end - start
    nearest = np.clip(points @ axis / (axis @ axis), 0, 1)[..., None] * axis
    inside = np.linalg.norm(points - nearest, axis=-1) <= radius
    expected = inside.reshape(32, fine, 40, fine).mean(axis=(1, 3))
    whole = np.zeros((32, 40))
    whole[window] = coverage
    assert np.abs(whole - expected).max() < 0.15 and np.abs(whole - expected).mean() < 0.005


def test_a_capsule_outside_the_frame_touches_nothing():
    for place in (-40.0, 100.0):
        spot = np.array([place, place])
        _, coverage, _ = capsule_coverage(spot, spot + 3, 2.0, height=32, width=32)
        assert coverage.size == 0 or coverage.max() == 0


def test_noise_is_smooth_and_bounded():
    noise = smooth_noise(np.random.default_rng(0), 64, 96, cell=16)
    assert noise.shape == (64, 96) and np.abs(noise).max() < 1.5
    assert noise.std() > 0.1
    assert np.abs(np.diff(noise, axis=1)).mean() < 0.3 * noise.std()


def test_scrolling_by_whole_pixels_is_a_slice():
    texture = np.random.default_rng(0).random((4, 20, 3))
    assert np.array_equal(scrolled(texture, 5.0, 10), texture[:, 5:15])
    np.testing.assert_allclose(
        scrolled(texture, 5.5, 10), (texture[:, 5:15] + texture[:, 6:16]) / 2
    )
