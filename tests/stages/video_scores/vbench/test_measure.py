"""VBench's dimensions of whole videos: protocols, shared frames and pairs, what is missing."""

import math

import numpy as np
import pytest
import torch

from stages.video_scores.vbench.dimensions import VBENCH, consistency
from stages.video_scores.vbench.long import mapping_of
from stages.video_scores.vbench.measure import vbench_scores
from stages.video_scores.vbench.networks import NO_NETWORKS, VBenchNetworks

HEIGHT, WIDTH = 136, 150
SHORT, LONG = 16, 49
"""Frames of 2 s and of 6.1 s at 8 per second."""


def video(frames, *, seed=0, height=HEIGHT):
    noise = np.random.default_rng(seed)
    return noise.integers(0, 256, (frames, height, WIDTH, 3), dtype=np.uint8)


def still(frames):
    return np.repeat(video(1), frames, axis=0)


def corner(frames_BCHW):
    """A feature of each frame: its first pixels."""
    return frames_BCHW[:, :, 0, :4].flatten(1) - 100


def other_corner(frames_BCHW):
    return frames_BCHW[:, :, -1, -4:].flatten(1) + 1


class Networks:
    """Networks that can be worked out by hand, and what they were asked for."""

    def __init__(self, *, speed=0.0):
        self.batches, self.flows, self.interpolations = [], [], []
        self._speed = speed
        self.all = VBenchNetworks(
            device=torch.device("cpu"),
            dino=self.encode,
            clip=other_corner,
            dinov2=other_corner,
            dreamsim=corner,
            flow=self.flow,
            interpolate=self.interpolate,
        )

    def encode(self, frames_BCHW):
        self.batches.append(len(frames_BCHW))
        return corner(frames_BCHW)

    def flow(self, first_BCHW, second_BCHW):
        assert first_BCHW.shape[-2:] == (136, 152), "sides are multiples of 8"
        self.flows.append(len(first_BCHW))
        flow_B2HW = torch.zeros_like(first_BCHW)[:, :2]
        flow_B2HW[:, 0] = self._speed
        return flow_B2HW

    def interpolate(self, first_BCHW, second_BCHW):
        assert first_BCHW.shape == (1, 3, 144, 160), "sides are multiples of 16"
        self.interpolations.append(1)
        return first_BCHW / 255


def features_of(frames_THWC, encode):
    return encode(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).float()).double().numpy()


@pytest.mark.parametrize("frames", [SHORT, LONG])
def test_a_still_video_is_perfectly_consistent_and_does_not_move(frames):
    found, problem = vbench_scores(still(frames), fps=8.0, networks=Networks().all)
    assert problem is None
    assert found.pop("dynamic_degree") == 0
    # From one frame's 8 bits to 0 to 1 and back, cut off: a level may be lost.
    assert found.pop("motion_smoothness") == pytest.approx(1, abs=1 / 255)
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert len(found) == 3


def test_values_are_within_the_scores_ranges():
    found, _ = vbench_scores(video(LONG), fps=8.0, networks=Networks(speed=30.0).all)
    assert found.keys() == {score.name for score in VBENCH}
    for score in VBENCH:
        score.check(found[score.name])


def test_a_short_video_is_measured_as_a_whole():
    frames_THWC = video(SHORT)
    found, _ = vbench_scores(frames_THWC, fps=8.0, networks=Networks().all)
    assert found["subject_consistency"] == pytest.approx(
        consistency(features_of(frames_THWC, corner))
    )
    assert found["background_consistency"] == pytest.approx(
        consistency(features_of(frames_THWC, other_corner))
    )


def test_a_long_video_is_measured_in_pieces_and_from_piece_to_piece():
    frames_THWC = video(LONG)
    found, _ = vbench_scores(frames_THWC, fps=8.0, networks=Networks().all)
    for dimension, inside, outside in (
        ("subject_consistency", corner, other_corner),
        ("background_consistency", other_corner, corner),
    ):
        features_TD = features_of(frames_THWC, inside)
        within = np.mean(
            [consistency(features_TD[first : first + 16]) for first in (0, 16, 32, 33)]
        )
        between = consistency(features_of(frames_THWC[[0, 16, 32, 33]], outside))
        mapped = np.interp(between, np.linspace(0, 1, 101), mapping_of(dimension))
        assert found[dimension] == pytest.approx((within + mapped) / 2)


def test_without_a_network_between_pieces_only_the_pieces_count():
    frames_THWC = video(LONG)
    networks = VBenchNetworks(device=torch.device("cpu"), dino=corner)
    found, _ = vbench_scores(frames_THWC, fps=8.0, networks=networks)
    features_TD = features_of(frames_THWC, corner)
    within = [consistency(features_TD[first : first + 16]) for first in (0, 16, 32, 33)]
    assert found["subject_consistency"] == pytest.approx(np.mean(within))


@pytest.mark.parametrize(("frames", "firsts"), [(SHORT, [0]), (LONG, [0, 16, 32, 33])])
def test_every_second_frame_is_compared_with_its_interpolation(frames, firsts):
    frames_THWC = video(frames)
    found, _ = vbench_scores(frames_THWC, fps=8.0, networks=Networks().all)
    of_pieces = []
    for first in firsts:
        errors = [
            # The fake repeats the frame before; 8 bits survive a float32 from 0 to 1 but for one.
            np.abs(frames_THWC[first + k].astype(float) - frames_THWC[first + k - 1]).mean()
            for k in range(1, min(16, frames) - 1, 2)
        ]
        assert len(errors) == 7
        of_pieces.append(1 - np.mean(errors) / 255)
    assert found["motion_smoothness"] == pytest.approx(np.mean(of_pieces), abs=1 / 255)


def test_interpolations_are_cut_off_to_8_bits_not_rounded():
    networks = VBenchNetworks(
        device=torch.device("cpu"), interpolate=lambda first, _: torch.full_like(first, 100.9 / 255)
    )
    frames_THWC = np.full((3, HEIGHT, WIDTH, 3), 110, np.uint8)
    found, _ = vbench_scores(frames_THWC, fps=8.0, networks=networks)
    assert found["motion_smoothness"] == pytest.approx(1 - 10 / 255)


def test_an_interpolation_that_is_nan_is_no_value():
    networks = VBenchNetworks(
        device=torch.device("cpu"), interpolate=lambda first, _: torch.full_like(first, math.nan)
    )
    found, _ = vbench_scores(video(SHORT), fps=8.0, networks=networks)
    assert math.isnan(found["motion_smoothness"])


class TestFlow:
    FAST = 6 * HEIGHT / 256
    FAST_STATIC = 3 * HEIGHT / 256

    def scores(self, speed, frames=SHORT, fps=8.0):
        networks = Networks(speed=speed)
        found, _ = vbench_scores(video(frames), fps=fps, networks=networks.all)
        return found["dynamic_degree"], found["temporal_flickering"]

    @pytest.mark.parametrize("frames", [SHORT, LONG])
    def test_speed_decides_on_dynamic_degree_and_flickering(self, frames):
        dynamic, flickering = self.scores(0.99 * self.FAST_STATIC, frames)
        assert dynamic == 0
        assert 0 < flickering < 1
        dynamic, flickering = self.scores(1.01 * self.FAST_STATIC, frames)
        assert dynamic == 0
        assert math.isnan(flickering), "VBench measures it on videos without motion"
        assert self.scores(0.99 * self.FAST, frames)[0] == 0
        assert self.scores(1.01 * self.FAST, frames)[0] == 1

    def test_a_part_of_the_pieces_may_move(self):
        """The last 17 frames are darker; the fake flow sees brightness."""

        def flow(first_BCHW, second_BCHW):
            dark_B = first_BCHW.mean(dim=(1, 2, 3)) < 100
            return torch.where(dark_B[:, None, None, None], 50.0, 0.0) * first_BCHW[:, :2] / 50

        frames_THWC = np.full((LONG, HEIGHT, WIDTH, 3), 200, np.uint8)
        frames_THWC[32:] = 50
        networks = VBenchNetworks(device=torch.device("cpu"), flow=flow)
        found, _ = vbench_scores(frames_THWC, fps=8.0, networks=networks)
        assert found == pytest.approx({"dynamic_degree": 0.5, "temporal_flickering": 1.0})

    def test_pairs_and_frames_are_computed_once(self):
        networks = Networks()
        vbench_scores(video(LONG), fps=8.0, networks=networks.all)
        assert sum(networks.batches) == LONG
        assert max(networks.batches) <= 16
        # 48 consecutive pairs without 15 to 16 and 31 to 32, and 2 from end to end of each piece.
        assert sum(networks.flows) == 48 - 2 + 2 * 4
        # Frames 0, 2, .. of the pieces at 0, 16 and 32; 33, 35, .. of the last.
        assert len(networks.interpolations) == 4 * 7

    def test_higher_rates_are_thinned_to_8_frames_per_second(self):
        networks = Networks()
        vbench_scores(video(SHORT), fps=24.0, networks=networks.all)
        consecutive, thinned, ends = 15, 5, 2
        assert sum(networks.flows) == consecutive + thinned + ends


def test_flickering_of_a_long_video_is_the_mean_of_its_pieces():
    frames_THWC = np.zeros((LONG, HEIGHT, WIDTH, 3), np.uint8)
    frames_THWC[16] = 51
    found, _ = vbench_scores(frames_THWC, fps=8.0, networks=NO_NETWORKS)
    # The bright frame is the first of a piece of 16: one change of 15, by a fifth.
    assert found == pytest.approx({"temporal_flickering": 1 - 0.2 / 15 / 4})


def test_small_frames_lack_what_raft_and_amt_give_and_it_is_told():
    found, problem = vbench_scores(video(SHORT, height=100), fps=8.0, networks=Networks().all)
    assert found.keys() == {"subject_consistency", "background_consistency"}
    assert problem is not None
    assert "100x150" in problem
    networks = VBenchNetworks(device=torch.device("cpu"), dino=corner)
    found, problem = vbench_scores(video(SHORT, height=100), fps=8.0, networks=networks)
    assert found.keys() == {"subject_consistency", "temporal_flickering"}
    assert problem is None


@pytest.mark.parametrize("frames", [1, 2])
def test_very_short_videos_have_what_they_allow(frames):
    found, _ = vbench_scores(video(frames), fps=8.0, networks=Networks().all)
    assert math.isnan(found["dynamic_degree"])
    assert math.isnan(found["motion_smoothness"])
    assert math.isnan(found["subject_consistency"]) == (frames == 1)
    assert math.isnan(found["temporal_flickering"]) == (frames == 1)
