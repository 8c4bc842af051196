"""Distances over features: which are computed for how many videos, between which sets, of what."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.clips import ClipsConfig, write_video
from stages.evaluate.distances import frechet_distance, kernel_mmd
from stages.evaluate.feature_distances import compare_features, feature_distance
from stages.evaluate.reference import open_reference
from stages.evaluate.videos import open_side
from stages.progress import SilentProgress
from stages.video_features.config import FeaturesConfig
from stages.video_features.network import FeatureProtocol, read_at

CLIPS = ClipsConfig(path=Path("unused"), num_frames=9, height=16, width=32, fps=8.0)


def between(first, second, *, allow_few=False):
    return feature_distance(("a", first), ("b", second), allow_few=allow_few, seed=0)


class TestNumbers:
    def test_256_videos_have_both_distances(self):
        first, second = np.random.default_rng(0).normal(size=(2, 256, 5)).astype("f4")
        found = between(first, second)
        assert found.frechet.value == frechet_distance(first, second)
        assert found.frechet.standard_error is None and not found.frechet.note
        mmd = kernel_mmd(first, second, seed=0)
        assert (found.mmd.value, found.mmd.standard_error) == (mmd.squared, mmd.standard_error)
        assert found.videos == (256, 256)

    def test_fewer_have_no_frechet_distance_unless_asked_for(self):
        first, second = np.random.default_rng(1).normal(size=(2, 255, 3))
        refused = between(first, second)
        assert refused.frechet.value is None
        assert "needs 256 videos" in refused.frechet.note
        assert "evaluate.features.allow_few=true" in refused.frechet.text
        assert refused.mmd.value is not None
        asked = between(first, second, allow_few=True)
        assert asked.frechet.value == frechet_distance(first, second, allow_few=True)
        assert asked.frechet.text.endswith("biased, compare only sets of 255 videos")

    def test_the_smaller_set_decides(self):
        rng = np.random.default_rng(2)
        for counts in ((300, 255), (255, 300)):
            first, second = (rng.normal(size=(count, 3)) for count in counts)
            assert between(first, second).frechet.value is None

    @pytest.mark.parametrize("videos", [0, 1, 4])
    def test_four_videos_have_neither(self, videos):
        few, many = np.zeros((videos, 3)), np.random.default_rng(3).normal(size=(300, 3))
        found = between(few, many)
        assert found.frechet.value is None and found.mmd.value is None
        assert found.mmd.text == f"none: {videos} videos have features, and it needs 10"

    def test_four_videos_have_a_frechet_distance_only_if_asked_for(self):
        first, second = np.random.default_rng(4).normal(size=(2, 4, 3))
        found = between(first, second, allow_few=True)
        assert found.frechet.value is not None and found.mmd.value is None
        assert between(first[:1], second, allow_few=True).frechet.value is None

    def test_equal_sets_have_a_frechet_distance_of_0(self):
        features = np.random.default_rng(5).normal(size=(300, 7))
        assert between(features, features[::-1]).frechet.value == pytest.approx(0, abs=1e-9)


class FirstPixel:
    """The mean colour of the first frame."""

    protocol = FeatureProtocol(
        network="pixel.pt",
        sha256="ab" * 32,
        clips=read_at(CLIPS, 2),
        resize="not resized",
        features="mean colours",
    )

    def __init__(self):
        self.calls = 0

    def load(self, device):
        def features_of(frames_THWC):
            self.calls += 1
            return frames_THWC[0].mean(axis=(0, 1), dtype=np.float32)

        return features_of


@pytest.fixture
def videos(tmp_path):
    """Returns a function that writes videos of one grey each."""

    def write(folder, *greys, frames=3):
        for number, grey in enumerate(greys):
            path = tmp_path / folder / f"{number:03d}.mp4"
            write_video(path, np.full((frames, 16, 32, 3), grey, np.uint8), 8.0)
        return tmp_path / folder

    return write


@pytest.fixture
def compare(tmp_path):
    def run(*folders, reference=None, network=None, **settings):
        return compare_features(
            network or FirstPixel(),
            [open_side(folder.name, folder) for folder in folders],
            None if reference is None else open_reference(reference, CLIPS),
            FeaturesConfig(network="pixel.pt", **settings),
            folder=tmp_path / "features",
            device=torch.device("cpu"),
            seed=0,
            progress=SilentProgress(),
        )

    return run


def test_sides_are_compared_to_the_reference_and_to_each_other(videos, compare):
    dark, bright = videos("dark", *range(40, 51)), videos("bright", *range(90, 101))
    real = videos("real", *range(50, 62))
    found = compare(dark, bright, reference=real, allow_few=True)
    pairs = [(one.first, one.second, one.videos) for one in found.distances]
    assert pairs == [
        ("dark", "real", (11, 11 + 1)),
        ("bright", "real", (11, 12)),
        ("dark", "bright", (11, 11)),
    ]
    near, far, apart = (one.mmd.value for one in found.distances)
    assert near < far and near < apart
    # Grey videos: three equal features, so that the distance is three times that of one.
    greys = np.arange(90.0, 101), np.arange(50.0, 62)
    expected = 3 * (np.mean(greys[0]) - np.mean(greys[1])) ** 2
    assert found.distances[1].frechet.value == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("given", ["sides", "side and reference"])
def test_two_sets_have_one_distance(given, videos, compare):
    first, second = videos("a", *range(10)), videos("b", *range(10))
    found = compare(first, second) if given == "sides" else compare(first, reference=second)
    assert [(one.first, one.second) for one in found.distances] == [("a", "b")]


def test_every_figure_is_printed_with_what_it_depends_on(videos, compare):
    found = compare(videos("a", *range(10)), videos("b", *range(10, 20)))
    (frechet, refused), (mmd, value) = found.rows
    assert (frechet, mmd) == ("Frechet, a to b", "MMD^2, a to b")
    assert refused.endswith("10 and 10 videos") and value.endswith("10 and 10 videos")
    for part in ("pixel.pt", "first 2 frames at 8 fps", "16x32", "not resized", "mean colours"):
        assert part in found.protocol.text
    summary = json.loads(json.dumps(found.summary, allow_nan=False))
    assert summary["network"] == "pixel.pt" and summary["num_frames"] == 2
    assert summary["fps"] == 8.0 and summary["network_sha256"] == "ab" * 32
    assert summary["distances"][0]["videos"] == [10, 10]


def test_short_clips_are_counted_by_set(videos, compare):
    first, second = videos("a", *range(12)), videos("b", *range(10))
    write_video(first / "000.mp4", np.zeros((1, 16, 32, 3), np.uint8), 8.0)
    found = compare(first, second)
    assert found.distances[0].videos == (11, 10)
    [(name, key, why)] = found.problem_rows
    assert (name, key) == ("a", "000") and "too_short: 1 frames" in why


def test_sets_share_features_and_a_second_run_computes_none(videos, compare):
    side, real = videos("a", 50, 90, 130), videos("real", 50, 90, 130, 170)
    network = FirstPixel()
    compare(side, reference=real, network=network)
    assert network.calls == 4
    compare(side, reference=real, network=network)
    assert network.calls == 4
    videos("real", 200)
    compare(side, reference=real, network=network)
    assert network.calls == 5


def test_of_large_sets_clips_are_taken_evenly(videos, compare):
    side, real = videos("a", *range(0, 100, 10)), videos("real", *range(0, 225, 5))
    found = compare(side, reference=real, max_clips=15)
    assert found.distances[0].videos == (10, 15)
    whole = compare(side, reference=videos("third", *range(10, 225, 15)))
    assert found.distances[0].mmd.value == pytest.approx(whole.distances[0].mmd.value, rel=1e-6)
