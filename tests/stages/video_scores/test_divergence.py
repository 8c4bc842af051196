"""Divergence from a reference clip: a float64 loop, closed forms, invariances, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.local_gram_flow import neighbour_mask
from stages.video_scores.divergence import DIVERGENCE, NotComparableError, divergence_scores
from stages.video_scores.structure import SubjectTracks

# Legend: T frame, P pair of frames, H W token grid, K neighbour.

HEIGHT, WIDTH, RADIUS = 4, 6, 1
TEMPERATURE = 0.1


def tracks_of(seed, *, pairs=3, size=(HEIGHT, WIDTH), radius=RADIUS, fps=8.0):
    """Tracks with a random Gram flow and a random subject of about half of the tokens."""
    random = np.random.default_rng(seed)
    tokens_THW = random.random((pairs + 1, *size)) < 0.5
    tokens_THW[:, 0, 0] = True
    masks = tokens_THW.repeat(4, axis=1).repeat(4, axis=2)
    neighbours = (2 * radius + 1) ** 2
    return SubjectTracks(
        forward_TMN=masks,
        backward_TMN=masks,
        valid_T=np.ones(pairs + 1, bool),
        similarities_PHWK=torch.from_numpy(random.uniform(-1, 1, (pairs, *size, neighbours))),
        fps=fps,
    )


def scores_of(tracks, reference):
    found = divergence_scores(tracks, reference, temperature=TEMPERATURE)
    assert list(found) == [score.name for score in DIVERGENCE]
    for score in DIVERGENCE:
        score.check(found[score.name])
    return found


def by_loop(tracks, reference):
    """Both scores, token by token."""

    def shares(flow, pair, y, x):
        inside = [
            3 * dy + dx
            for dy in range(3)
            for dx in range(3)
            if 0 <= y + dy - 1 < HEIGHT and 0 <= x + dx - 1 < WIDTH
        ]
        weights = [math.exp(flow[pair, y, x, k].item() / TEMPERATURE) for k in inside]
        return [weight / math.fsum(weights) for weight in weights]

    divergences, from_uniform = [], []
    for pair in range(len(reference.similarities_PHWK)):
        if not all(one.valid_T[t] for one in (tracks, reference) for t in (pair, pair + 1)):
            continue
        for y in range(HEIGHT):
            for x in range(WIDTH):
                if not reference.forward_TMN[pair, 4 * y, 4 * x]:
                    continue
                real = shares(reference.similarities_PHWK, pair, y, x)
                made = shares(tracks.similarities_PHWK, pair, y, x)
                divergences.append(
                    math.fsum(p * math.log(p / q) for p, q in zip(real, made, strict=True))
                )
                entropy = -math.fsum(p * math.log(p) for p in real)
                from_uniform.append(math.log(len(real)) - entropy)
    return math.fsum(divergences) / len(divergences), math.fsum(from_uniform) / len(from_uniform)


@given(st.integers(0, 2**32 - 1))
def test_scores_are_those_of_a_loop(seed):
    tracks, reference = tracks_of(seed), tracks_of(seed + 1)
    tracks.valid_T[3] = False
    found = scores_of(tracks, reference)
    assert tuple(found.values()) == pytest.approx(by_loop(tracks, reference), rel=1e-9)


@given(st.integers(0, 2**32 - 1))
def test_the_clip_itself_has_no_divergence(seed):
    reference = tracks_of(seed)
    found = scores_of(reference, reference)
    assert found["flow_divergence"] == pytest.approx(0, abs=1e-12)
    assert found["uniform_divergence"] > 0


def test_a_video_without_information_has_the_divergence_of_a_uniform_choice():
    reference = tracks_of(0)
    flat = replace(reference, similarities_PHWK=torch.full_like(reference.similarities_PHWK, 0.7))
    found = scores_of(flat, reference)
    assert found["flow_divergence"] == pytest.approx(found["uniform_divergence"], rel=1e-12)


def test_certain_motion_the_other_way_costs_its_closed_form():
    # All neighbours of an inner token are equal but for one, which is 0.5 above: left or right.
    reference = tracks_of(0)
    masks = np.zeros_like(reference.forward_TMN)
    masks[:, 4:8, 8:12] = True
    left, right = (torch.zeros(3, HEIGHT, WIDTH, 9, dtype=torch.float64) for _ in range(2))
    left[..., 3] = right[..., 5] = 0.5
    reference = replace(reference, forward_TMN=masks, similarities_PHWK=left)
    found = scores_of(replace(reference, similarities_PHWK=right), reference)
    total = math.exp(5) + 8
    assert found["flow_divergence"] == pytest.approx(5 * (math.exp(5) - 1) / total, rel=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_what_a_softmax_or_the_subject_leaves_out_does_not_count(seed, shift):
    tracks, reference = tracks_of(seed), tracks_of(seed + 1)
    expected = scores_of(tracks, reference)
    random = torch.Generator().manual_seed(seed)
    moved = tracks.similarities_PHWK + shift
    outside_HWK = ~neighbour_mask(HEIGHT, WIDTH, RADIUS)
    moved[:, outside_HWK] = 50 * torch.rand(moved[:, outside_HWK].shape, generator=random).double()
    background_PHW = torch.from_numpy(~reference.forward_TMN[:3, ::4, ::4])
    moved[background_PHW] = torch.rand(moved[background_PHW].shape, generator=random).double()
    another = replace(tracks, similarities_PHWK=moved, forward_TMN=~tracks.forward_TMN)
    assert scores_of(another, reference) == pytest.approx(expected, rel=1e-9)


def test_a_mirrored_pair_has_the_same_scores():
    def mirrored(tracks):
        flow = tracks.similarities_PHWK.unflatten(-1, (3, 3)).flip(2, -1).flatten(-2)
        masks = np.ascontiguousarray(tracks.forward_TMN[:, :, ::-1])
        return replace(tracks, similarities_PHWK=flow, forward_TMN=masks)

    tracks, reference = tracks_of(0), tracks_of(1)
    expected = scores_of(tracks, reference)
    assert scores_of(mirrored(tracks), mirrored(reference)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("side", ["video", "clip"])
def test_frames_that_a_track_does_not_see_are_left_out_whatever_they_hold(side):
    tracks, reference = tracks_of(0), tracks_of(1)
    hidden = tracks if side == "video" else reference
    hidden.valid_T[0] = False
    expected = scores_of(tracks, reference)
    hidden.similarities_PHWK[0] = math.nan
    assert scores_of(tracks, reference) == expected
    assert tuple(expected.values()) == pytest.approx(by_loop(tracks, reference), rel=1e-9)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pairs": 2}, "its Gram flow has 2 pairs of 4x6 tokens with 9 .* clip's 3 pairs of 4x6"),
        ({"size": (6, 4)}, "3 pairs of 6x4 tokens .* 3 pairs of 4x6 tokens"),
        ({"radius": 2}, "tokens with 25 neighbours, .* tokens with 9 neighbours"),
        ({"fps": 16.0}, "it has 16 frames per second, the reference clip 8"),
    ],
)
def test_videos_that_do_not_correspond_are_told_apart(other, message):
    with pytest.raises(NotComparableError, match=message):
        scores_of(tracks_of(0, **other), tracks_of(1))


def test_nearly_equal_rates_are_compared():
    scores_of(tracks_of(0, fps=24), tracks_of(1, fps=24000 / 1001))


def test_videos_that_show_the_subject_at_different_times_have_no_divergence():
    tracks, reference = tracks_of(0), tracks_of(1)
    tracks.valid_T[:2], reference.valid_T[2:] = False, False
    with pytest.raises(NotComparableError, match="no pair of frames shows the subject"):
        scores_of(tracks, reference)
    empty = replace(reference, forward_TMN=np.zeros_like(reference.forward_TMN))
    with pytest.raises(NotComparableError, match="no pair of frames shows the subject"):
        scores_of(tracks_of(0), empty)
