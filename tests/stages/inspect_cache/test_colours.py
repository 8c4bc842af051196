import colorsys
import math

import numpy as np
import pytest

from stages.inspect_cache.colours import flow_colours, pca_colours


def features(seed=0, shape=(3, 4, 5, 16)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_colours_order_tokens_as_a_singular_value_decomposition_does():
    """Against numpy's SVD of the same tokens: each colour rises with its component."""
    features_THWC = features() * np.linspace(4, 0.1, 16)
    colours_N3 = pca_colours(features_THWC).reshape(-1, 3).astype(float)
    tokens_NC = features_THWC.reshape(-1, 16).astype(np.float64)
    tokens_NC -= tokens_NC.mean(axis=0)
    _, _, components = np.linalg.svd(tokens_NC, full_matrices=False)
    for colour, component in zip(colours_N3.T, components, strict=False):
        correlation = np.corrcoef(colour, tokens_NC @ component)[0, 1]
        assert abs(correlation) > 0.98


def test_a_part_keeps_its_colour_while_it_moves():
    features_THWC = np.tile(features(shape=(1, 1, 2, 16)), (4, 4, 4, 1))
    features_THWC[0, 0, 0] = features_THWC[2, 3, 2] = features(seed=1, shape=(16,))
    colours_THWC = pca_colours(features_THWC)
    assert (colours_THWC[0, 0, 0] == colours_THWC[2, 3, 2]).all()
    assert (colours_THWC[0, 1] == colours_THWC[3, 2]).all()


def test_half_precision_gives_nearly_the_same_colours():
    full, half = pca_colours(features()), pca_colours(features().astype(np.float16))
    assert np.abs(full.astype(int) - half.astype(int)).max() <= 2


def test_colours_use_the_whole_range():
    colours_THWC = pca_colours(features(shape=(4, 20, 20, 8)))
    assert colours_THWC.dtype == np.uint8
    assert (colours_THWC.min(axis=(0, 1, 2)) == 0).all()
    assert (colours_THWC.max(axis=(0, 1, 2)) == 255).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_channels_that_are_not_there_leave_their_colour_grey(channels):
    colours_THWC = pca_colours(features(shape=(2, 4, 4, channels)))
    assert (colours_THWC[..., channels:] == 128).all()


def test_a_constant_clip_is_grey():
    assert (pca_colours(np.ones((2, 3, 3, 8), np.float16)) == 128).all()


def test_values_that_are_not_finite_are_refused():
    broken = features()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        pca_colours(broken)


def test_other_axes_are_refused():
    with pytest.raises(ValueError, match=r"must be \[T, H, W, C\]"):
        pca_colours(np.ones((3, 4, 5)))


@pytest.mark.parametrize("degrees", range(0, 360, 15))
@pytest.mark.parametrize("length", [0.0, 0.3, 1.0, 5.0])
def test_hue_is_direction_and_saturation_length(degrees, length):
    """Against the standard library's HSV."""
    angle = math.radians(degrees)
    flow_HW2 = np.array([[[math.cos(angle) * length, math.sin(angle) * length]]])
    expected = colorsys.hsv_to_rgb(degrees / 360, min(length / 2.0, 1.0), 1.0)
    found = flow_colours(flow_HW2, largest=2.0)[0, 0]
    assert np.abs(found - np.array(expected) * 255).max() <= 1
