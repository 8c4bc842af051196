import numpy as np
import pytest

from stages.inspect_cache.clip_view import flow_of_features, frames_of_moments, view_clip


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (-2, 1), (0, 0)])
def test_features_that_move_by_whole_tokens_give_that_flow(moving_features, dx, dy):
    flow_PHW2 = flow_of_features(moving_features(dx, dy), radius=2, temperature=0.03)
    inner = flow_PHW2[:, 2:-2, 2:-2]
    np.testing.assert_allclose(inner, np.broadcast_to([dx, dy], inner.shape), atol=0.01)


def test_an_edge_does_not_make_still_features_flow():
    """Flat similarities say nothing of motion, also where the window is cut by the grid's edge."""
    flow_PHW2 = flow_of_features(np.ones((3, 5, 6, 4), np.float16), radius=2, temperature=0.1)
    np.testing.assert_allclose(flow_PHW2, 0.0, atol=1e-6)


def test_motion_along_an_edge_is_seen_there(moving_features):
    flow_PHW2 = flow_of_features(moving_features(1, 0), radius=1, temperature=0.03)
    np.testing.assert_allclose(flow_PHW2[:, 0, 1:-1], flow_PHW2[:, 3, 1:-1], atol=0.01)
    np.testing.assert_allclose(flow_PHW2[:, 0, 1:-1, 0], 1.0, atol=0.01)


def test_moments_at_frame_rate_are_the_frames():
    assert frames_of_moments(9, 9) == list(range(9))


def test_moments_at_latent_rate_are_each_groups_last_frame():
    assert frames_of_moments(13, 49) == [0, *range(4, 49, 4)]


def test_a_store_of_other_clips_is_refused():
    with pytest.raises(ValueError, match=r"8 moments .*num_frames=9 gives 9 frames or 3 latent"):
        frames_of_moments(8, 9)


def view(features_THWC, *, flow=(2, 0.1), valid_T=None):
    flow_PHW2 = flow_of_features(features_THWC, *flow)
    return view_clip(features_THWC, flow_PHW2, num_frames=9, valid_T=valid_T)


def test_full_colour_is_the_longest_flow_but_never_noise(moving_features):
    # A little over 2: tokens at the border have lost the one they match.
    assert 2 <= view(moving_features(2, 0), flow=(2, 0.03)).largest_flow < 2.5
    assert view(np.ones((9, 6, 8, 4), np.float16)).largest_flow < 2
    assert view(moving_features(0, 0), flow=(1, 0.001)).largest_flow == 0.2


def test_what_is_not_valid_decides_neither_colours_nor_scale(moving_features):
    features_THWC = moving_features(1, 0)
    valid_T = np.arange(9) < 7
    spoiled_THWC = np.where(valid_T[:, None, None, None], features_THWC, features_THWC[::-1] * 50)
    expected = view(features_THWC, valid_T=valid_T)
    seen = view(spoiled_THWC.astype(np.float16), valid_T=valid_T)
    assert (seen.colours_THWC[:7] == expected.colours_THWC[:7]).all()
    assert seen.largest_flow == expected.largest_flow
    nothing = view(spoiled_THWC, valid_T=np.zeros(9, bool))
    assert nothing.largest_flow == 0.2
