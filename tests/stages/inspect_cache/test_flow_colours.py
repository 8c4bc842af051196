import colorsys
import math

import numpy as np
import pytest

from stages.inspect_cache.flow_colours import flow_colours, flow_panel, wheel


@pytest.mark.parametrize("degrees", range(0, 360, 15))
@pytest.mark.parametrize("length", [0.0, 0.3, 1.0, 5.0])
def test_hue_is_direction_and_saturation_length(degrees, length):
    """Against the standard library's HSV."""
    angle = math.radians(degrees)
    flow_HW2 = np.array([[[math.cos(angle) * length, math.sin(angle) * length]]])
    expected = colorsys.hsv_to_rgb(degrees / 360, min(length / 2.0, 1.0), 1.0)
    found = flow_colours(flow_HW2, largest=2.0)[0, 0]
    assert np.abs(found - np.array(expected) * 255).max() <= 1


def dark(panel):
    return np.asarray(panel).max(axis=-1) < 90


def test_arrows_point_along_the_flow():
    """The head is the broad end: more ink on the side the flow goes to."""
    flow_HW2 = np.zeros((1, 1, 2))
    flow_HW2[..., 0] = 1.0
    right = dark(flow_panel(flow_HW2, (60, 60), largest=1.0))
    assert right[:, 30:].sum() > 1.5 * right[:, :30].sum()
    down = dark(flow_panel(flow_HW2[..., ::-1], (60, 60), largest=1.0))
    assert (down == right.T).mean() > 0.99


def test_a_flow_longer_than_the_largest_stays_in_its_cell():
    flow_HW2 = np.full((2, 2, 2), 50.0)
    ink = dark(flow_panel(flow_HW2, (80, 80), largest=1.0))
    assert not ink[:, 0].any()
    assert not ink[38:42, 38:42].any()


def test_no_flow_is_white_with_dots():
    panel = np.asarray(flow_panel(np.zeros((4, 6, 2)), (120, 80), largest=1.0))
    assert panel.shape == (80, 120, 3)
    assert (panel == 255).mean() > 0.9
    assert (panel < 128).any()


def test_fine_grids_get_fewer_arrows_than_tokens():
    flow_HW2 = np.tile(np.array([1.0, 0.0]), (64, 64, 1))
    ink = dark(flow_panel(flow_HW2, (128, 128), largest=1.0))
    assert 0.02 < ink.mean() < 0.4


def test_the_legend_shows_each_direction_where_it_points():
    legend = np.asarray(wheel(101, (250, 250, 248)))
    assert (legend[0, 0] == [250, 250, 248]).all()
    assert legend[50, 50].min() > 240
    right, below = legend[50, 97], legend[97, 50]
    assert np.abs(right - flow_colours(np.array([[[1.0, 0.0]]]), 1.0)[0, 0].astype(int)).max() < 40
    assert np.abs(below - flow_colours(np.array([[[0.0, 1.0]]]), 1.0)[0, 0].astype(int)).max() < 40
