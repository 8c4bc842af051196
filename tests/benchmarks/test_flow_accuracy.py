"""The benchmark of true motion: its moves, likelihoods and prior, on figures moved by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.demo.figures import BODY_PLANS
from stages.demo.scenes import draw_clip
from stages.local_gram_flow.windows import neighbour_offsets
from tests.benchmarks.flow_accuracy import (
    PATCH,
    RADIUS,
    likelihood,
    prior_of,
    rows_of_points,
    true_moves,
)


@pytest.fixture(scope="module")
def clip():
    """A drawn clip of which all frames are the first."""
    drawn = draw_clip(0, num_frames=5, height=96, width=192, post_probability=0.0)
    first = [0] * len(drawn.frames_THWC)
    return replace(drawn, frames_THWC=drawn.frames_THWC[first], joints_TJ2=drawn.joints_TJ2[first])


def shifted(clip, dx):
    """The clip with everything `dx` pixels further right on every frame than on the one before."""
    steps = np.arange(len(clip.frames_THWC))
    frames = [
        np.roll(frame, dx * step, axis=1)
        for step, frame in zip(steps, clip.frames_THWC, strict=True)
    ]
    joints_TJ2 = clip.joints_TJ2 + np.stack([dx * steps, 0 * steps], -1)[:, None]
    return replace(clip, frames_THWC=np.stack(frames), joints_TJ2=joints_TJ2)


@pytest.mark.parametrize(
    ("rate", "dx", "tokens"), [("frame", 0, 0), ("frame", PATCH, 1), ("latent", 0, 0)]
)
def test_points_go_where_the_figure_is_moved(clip, rate, dx, tokens):
    moves = true_moves(shifted(clip, dx), rate)
    offsets_N2 = neighbour_offsets(RADIUS)[moves.neighbour_N]
    assert len(offsets_N2) > len(BODY_PLANS[clip.kind].limbs)
    assert offsets_N2.tolist() == [[tokens, 0]] * len(offsets_N2)
    assert set(moves.map_N) == set(range(4 if rate == "frame" else 1))


def test_a_map_that_names_each_token_by_its_place_finds_every_move(clip):
    """Features that move with the figure one token a frame; all else differs."""
    moves = true_moves(shifted(clip, PATCH), "frame")
    height, width = 96 // PATCH, 192 // PATCH
    features_HWG = torch.eye(height * width).view(height, width, -1)
    features_THWG = torch.stack([features_HWG.roll(frame, 1) for frame in range(5)])
    similar_NK, inside_NK = rows_of_points(features_THWG, moves, "frame")
    true_N = torch.from_numpy(moves.neighbour_N)
    assert similar_NK.masked_fill(~inside_NK, -1).argmax(-1).tolist() == true_N.tolist()
    count_N = inside_NK.sum(-1).double()
    expected_N = -torch.log(np.e / (np.e + count_N - 1))
    found_N = likelihood(similar_NK.double(), inside_NK, true_N)
    torch.testing.assert_close(found_N, expected_N)


def test_the_prior_is_the_frequency_of_each_move():
    neighbour_N = torch.tensor([12, 12, 12, 3])
    counts = torch.ones(25)
    counts[12], counts[3] = 4, 2
    torch.testing.assert_close(prior_of(neighbour_N).exp(), counts / 29)
