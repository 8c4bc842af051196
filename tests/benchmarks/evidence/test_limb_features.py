"""The teacher that knows where each limb is, and the store that is made of it."""

import math

import numpy as np
import pytest
import torch

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from stages.demo.figures import BODY_PLANS
from stages.video_scores.limb_labels import label_limbs
from tests.benchmarks.evidence.data import draw_faster_clip
from tests.benchmarks.evidence.limb_features import (
    CHANNELS,
    PIECE,
    limb_features,
    write_limb_features,
)
from tests.benchmarks.evidence.sizes import SIZES
from tests.benchmarks.flow_accuracy import rows_of_points, true_moves

SIZE = SIZES["default"]
GRID = (8, 12)


def feature_by_loop(clip, frame, row, column):
    """One token, pixel by pixel."""
    labels_HW = label_limbs(clip.frames_THWC, BODY_PLANS[clip.kind])[frame]
    joints = dict(zip(clip.joint_names, clip.joints_TJ2[frame], strict=True))
    pieces = [math.ceil(limb.length * clip.size / PIECE) for limb in clip.limbs]
    counts = np.zeros(CHANNELS)
    for y in range(16 * row, 16 * row + 16):
        for x in range(16 * column, 16 * column + 16):
            number = labels_HW[y, x]
            if number < 0:
                counts[0] += 0.1
                continue
            limb = clip.limbs[number]
            start, end = joints[limb.start], joints[limb.end]
            axis = end - start
            along = np.dot((x + 0.5, y + 0.5) - start, axis) / np.dot(axis, axis)
            place = min(max(along, 0), 1) * pieces[number]
            first = 1 + sum(pieces[:number]) + number
            for end_of_piece in range(pieces[number] + 1):
                counts[first + end_of_piece] += max(0, 1 - abs(place - end_of_piece))
    return counts / np.linalg.norm(counts)


@pytest.mark.parametrize("seed", [700_000, 700_001, 700_002])
def test_a_token_counts_the_pixels_of_each_piece(seed):
    clip = draw_faster_clip(seed, SIZE)
    features_THWG = limb_features(clip, GRID)
    assert features_THWG.shape == (17, *GRID, CHANNELS)
    with_limbs = (features_THWG[..., 0] < 1).nonzero().tolist()
    for frame, row, column in with_limbs[:: len(with_limbs) // 5]:
        expected_G = feature_by_loop(clip, frame, row, column)
        np.testing.assert_allclose(features_THWG[frame, row, column], expected_G, atol=1e-6)


def test_the_most_similar_token_of_the_next_frame_is_mostly_the_true_one():
    clips = [draw_faster_clip(seed, SIZE) for seed in (700_000, 700_001, 700_002)]
    right = []
    for clip in clips:
        moves = true_moves(clip, "frame")
        similar_NK, inside_NK = rows_of_points(limb_features(clip, GRID), moves, "frame")
        best_N = similar_NK.masked_fill(~inside_NK, -torch.inf).argmax(-1)
        right.append(best_N.numpy() == moves.neighbour_N)
    assert np.concatenate(right).mean() > 0.7


def test_tokens_are_squares():
    with pytest.raises(ValueError, match=r"128x192 pixels are not \(8, 11\) square tokens"):
        limb_features(draw_faster_clip(700_000, SIZE), (8, 11))


def test_the_store_has_the_clips_of_the_trackers_store(tmp_path):
    maps = 17
    settings = StoreSettings(
        kind="teacher",
        arrays={
            "features": ArraySpec(
                dtype="float16", shape=(maps, *GRID, 4), dimension_names=("t", "h", "w", "c")
            ),
            "valid": ArraySpec(dtype="uint8", shape=(maps,), dimension_names=("t",)),
        },
        values={
            "time_rate": "frame",
            "features": "memory_encoder",
            "fusion": "gram_flow",
            "parts": 2,
        },
    )
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    valid_T = (np.arange(maps) > 0).astype(np.uint8)
    seeds = {"00000": (600_000, 600_001), "00001": (600_002,)}
    for name, of_shard in seeds.items():
        with writer.shard(name, source=f"{name}.tar") as shard:
            for seed in of_shard:
                zeros = np.zeros((maps, *GRID, 4), np.float16)
                made = {"features": zeros, "valid": valid_T}
                shard.add(f"{name}/biped-{seed}", made, {"seed": seed}, fingerprint=f"{seed:032x}")
            shard.commit()
    made = StoreReader(write_limb_features(writer.path, SIZE))
    assert made.settings.values["features"] == "limbs"
    assert list(made.keys) == list(StoreReader(writer.path).keys)
    for key in made.keys:
        seed = int(key[-6:])
        expected_THWG = limb_features(draw_faster_clip(seed, SIZE), GRID)
        arrays = made.read(key)
        np.testing.assert_allclose(arrays["features"], expected_THWG, atol=1e-3)
        assert (arrays["valid"] == valid_T).all()
        assert made.record(key).fingerprint == f"{seed:032x}"
    assert write_limb_features(writer.path, SIZE) == made.path
