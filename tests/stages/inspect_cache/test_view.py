import numpy as np
import pytest

from stages.inspect_cache.picture import chosen_moments, compose, compose_video
from stages.inspect_cache.view import flow_of_features, frames_of_moments, view_clip


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


def view(features_THWC, **changes):
    settings = {
        "title": "walk/0007 in teacher-0",
        "num_frames": 9,
        "frames_THWC": None,
        "valid_T": None,
    }
    flow = changes.pop("flow", (2, 0.1))
    flow_PHW2 = None if flow is None else flow_of_features(features_THWC, *flow)
    return view_clip(features_THWC, flow_PHW2, **(settings | changes))


def test_rows_are_spread_over_the_moments_that_have_a_flow(moving_features):
    seen = view(moving_features(1, 0))
    assert chosen_moments(seen, 3) == [0, 4, 7]
    assert chosen_moments(seen, 50) == list(range(8))
    assert chosen_moments(view(moving_features(1, 0), flow=None), 2) == [0, 8]


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


def test_columns_appear_as_there_is_data(moving_features):
    features_THWC = moving_features(1, 0)
    frames_THWC = np.zeros((9, 96, 128, 3), np.uint8)
    bare = compose(view(features_THWC, flow=None), [0])
    framed = compose(view(features_THWC, flow=None, frames_THWC=frames_THWC), [0])
    whole = compose(view(features_THWC, frames_THWC=frames_THWC), [0])
    assert bare.width < framed.width < whole.width
    flow_PHW2 = flow_of_features(features_THWC, 2, 0.1)
    options = {"title": "", "num_frames": 9, "frames_THWC": frames_THWC, "valid_T": None}
    flow_alone = compose(view_clip(None, flow_PHW2, **options), [0])
    assert framed.width < flow_alone.width < whole.width
    assert flow_alone.height == whole.height


def test_frames_stand_beside_their_own_moment(moving_features):
    """The first column shows frame t in row t: its grey level says which it is."""
    frames_THWC = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full(
        (1, 96, 128, 3), 20, np.uint8
    )
    seen = view(moving_features(1, 0)[[0, 4, 8]], frames_THWC=frames_THWC)
    assert seen.labels == ("frame 0", "frame 4", "frame 8")
    picture = np.asarray(compose(seen, [0, 1]))
    column = picture[:, 72 + 144]
    assert (column == 0).all(axis=-1).sum() >= 200
    assert (column == 80).all(axis=-1).sum() >= 200


def test_every_video_frame_has_the_same_even_size(moving_features):
    features_THWC = moving_features(0, 1, grid=(7, 5))
    video_THWC = compose_video(view(features_THWC))
    assert video_THWC.shape[0] == 8
    assert video_THWC.shape[1] % 2 == 0
    assert video_THWC.shape[2] % 2 == 0


def test_a_title_too_long_or_in_another_script_still_draws(moving_features):
    seen = view(moving_features(1, 0), title="走る犬/" + "x" * 400)
    assert compose(seen, [0]).width < 1000
