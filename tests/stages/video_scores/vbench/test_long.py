"""VBench-Long's pieces and weights against its documentation's numbers and small cases by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.video_scores.vbench.long import (
    mapping_of,
    piece_fps,
    pieces_of,
    protocol_of,
    slow_fast,
)

CONSISTENCIES = ("subject_consistency", "background_consistency")


@pytest.mark.parametrize(
    ("num_frames", "fps", "protocol"),
    [
        (49, 8, "VBench-Long"),  # CogVideoX, 6.1 s
        (81, 16, "VBench-Long"),  # CogVideoX1.5, 5.1 s
        (40, 8, "VBench-Long"),
        (39, 8, "VBench"),
        (121, 25, "VBench"),
        (16, 8, "VBench"),
    ],
)
def test_videos_of_5_s_and_more_are_long(num_frames, fps, protocol):
    assert protocol_of(num_frames, fps) == protocol


@pytest.mark.parametrize(
    ("num_frames", "fps", "pieces"),
    [
        (49, 8.0, [(0, 15), (16, 31), (32, 47), (33, 48)]),
        (48, 8.0, [(0, 15), (16, 31), (32, 47)]),
        (81, 16.0, [(0, 31), (32, 63), (49, 80)]),
        (150, 30000 / 1001, [(0, 57), (58, 115), (92, 149)]),
        (4, 0.5, [(0, 1), (2, 3)]),
    ],
)
def test_pieces_are_2_s_long_and_the_last_borrows_frames(num_frames, fps, pieces):
    assert [(piece[0], piece[-1]) for piece in pieces_of(num_frames, fps)] == pieces


@given(num_frames=st.integers(1, 400), fps=st.floats(1, 60))
def test_pieces_cover_every_frame_and_are_of_one_length(num_frames, fps):
    pieces = pieces_of(num_frames, fps)
    assert {frame for piece in pieces for frame in piece} == set(range(num_frames))
    assert {len(piece) for piece in pieces} == {min(num_frames, 2 * piece_fps(fps))}


@pytest.mark.parametrize("dimension", CONSISTENCIES)
def test_the_mapping_rises_from_0_to_1(dimension):
    values = mapping_of(dimension)
    assert len(values) == 101
    assert (values[0], values[-1]) == (0.0, 1.0)
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize(
    ("dimension", "between", "mapped"),
    [
        ("subject_consistency", 0.5, 0.932674917380015),
        ("subject_consistency", 0.505, (0.932674917380015 + 0.933938855974875) / 2),
        ("subject_consistency", 0.01, 0.655812085783768),
        ("background_consistency", 0.5, 0.946057962880035),
        ("background_consistency", 0.5075, 0.946057962880035 * 0.25 + 0.946612672064614 * 0.75),
        ("background_consistency", 1.0, 1.0),
    ],
)
def test_half_of_the_value_is_from_piece_to_piece(dimension, between, mapped):
    assert slow_fast(0.9, between, dimension) == pytest.approx(0.45 + mapped / 2, abs=1e-12)


@pytest.mark.parametrize("dimension", CONSISTENCIES)
def test_without_similarity_from_piece_to_piece_only_the_pieces_count(dimension):
    assert slow_fast(0.9, 0.0, dimension) == 0.9
    assert math.isnan(slow_fast(0.9, math.nan, dimension))
