import json

import numpy as np
import pytest

from stages.demo import FigureClip, draw_clip
from stages.demo.backgrounds import scrolled, smooth_noise
from stages.demo.figures import BODY_PLANS, GAITS, PALETTE
from stages.demo.scenes import capsule_coverage

_SIZE = {"num_frames": 13, "height": 128, "width": 192}


@pytest.fixture(scope="module")
def clips() -> list[FigureClip]:
    return [draw_clip(seed, **_SIZE) for seed in range(12)]


def joints_of(clip: FigureClip, name: str) -> np.ndarray:
    return clip.joints_TJ2[:, clip.joint_names.index(name)]


def test_a_seed_gives_the_same_bytes_and_another_seed_others():
    first, again, other = draw_clip(4, **_SIZE), draw_clip(4, **_SIZE), draw_clip(7, **_SIZE)
    assert np.array_equal(first.frames_THWC, again.frames_THWC)
    assert first.ground_truth() == again.ground_truth()
    assert first.kind == other.kind
    assert not np.array_equal(first.frames_THWC, other.frames_THWC)


def test_shapes_and_kinds(clips):
    assert [clip.kind for clip in clips[:3]] == ["biped", "quadruped", "arm"]
    for clip in clips:
        assert clip.frames_THWC.shape == (13, 128, 192, 3)
        assert clip.frames_THWC.dtype == np.uint8
        assert clip.mask_HW.shape == (128, 192) and clip.mask_HW.dtype == np.bool_
        assert clip.joints_TJ2.shape == (13, len(clip.joint_names), 2)
        assert clip.visible_TL.shape == (13, len(clip.limbs))
        assert ((clip.visible_TL >= 0) & (clip.visible_TL <= 1)).all()


def test_limbs_keep_their_length(clips):
    for clip in clips:
        for limb in clip.limbs:
            span_T2 = joints_of(clip, limb.end) - joints_of(clip, limb.start)
            np.testing.assert_allclose(np.hypot(*span_T2.T), limb.length * clip.size, atol=1e-6)


def test_colours_differ_within_a_figure():
    for plan in BODY_PLANS.values():
        colours = np.array([PALETTE[limb.name] for limb in plan.limbs], float)
        gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
        assert gaps[~np.eye(len(colours), dtype=bool)].min() > 50


def test_visible_limbs_show_their_colour_on_their_axis(clips):
    checked = 0
    for clip in clips:
        for index, limb in enumerate(clip.limbs):
            for frame in np.nonzero(clip.visible_TL[:, index] > 0.9)[0]:
                middle = (joints_of(clip, limb.start) + joints_of(clip, limb.end))[frame] / 2
                x, y = np.floor(middle).astype(int)
                seen = clip.frames_THWC[frame, y, x].astype(int)
                assert np.abs(seen - limb.colour).max() <= 35, (limb.name, frame)
                checked += 1
    assert checked > 200


def test_the_mask_covers_the_coloured_pixels_of_the_first_frame(clips):
    for clip in clips:
        frame = clip.frames_THWC[0].astype(int)
        vivid_HW = frame.max(axis=-1) - frame.min(axis=-1) > 110
        assert (vivid_HW & ~clip.mask_HW).sum() <= 0.02 * clip.mask_HW.sum()
        assert 0.01 < clip.mask_HW.mean() < 0.3


def test_feet_stand_on_the_ground(clips):
    for clip in clips:
        if clip.kind == "arm":
            continue
        feet = [name for name in clip.joint_names if name.endswith(("_foot", "_ankle", "_toe"))]
        lowest_T = np.max([joints_of(clip, name)[:, 1] for name in feet], axis=0)
        assert np.ptp(lowest_T) < 1e-6 and 0.8 * 128 < lowest_T[0] < 0.92 * 128


def test_bodies_go_where_the_caption_says(clips):
    for clip in clips:
        if "to the" not in clip.caption or "pans" in clip.caption:
            continue
        hip_x_T = joints_of(clip, "hip")[:, 0]
        assert (hip_x_T[-1] > hip_x_T[0]) == ("to the right" in clip.caption)
        assert abs(hip_x_T[-1] - hip_x_T[0]) > 4


def test_figures_stay_in_the_frame():
    for seed in range(12):
        clip = draw_clip(seed, num_frames=49, height=64, width=96)
        inside = (clip.joints_TJ2 > 0).all(-1) & (clip.joints_TJ2 < (96, 64)).all(-1)
        assert inside.mean() > 0.95


def test_posts_and_pans_occur_and_hide_things():
    captions = {}
    for seed in range(24):
        clip = draw_clip(seed, num_frames=25, height=32, width=48)
        captions.setdefault("post" if "post" in clip.caption else "free", []).append(clip)
    assert 3 <= len(captions["post"]) <= 14
    hidden = [clip.visible_TL.mean() for clip in captions["post"]]
    assert np.mean(hidden) < np.mean([clip.visible_TL.mean() for clip in captions["free"]])


def test_the_truth_is_json_with_what_an_evaluation_needs(clips):
    for clip in clips[:3]:
        truth = json.loads(json.dumps(clip.ground_truth()))
        assert set(truth) == {
            "kind", "gait", "fps", "height", "width",
            "joint_names", "joints_xy", "limbs", "visible",
        }  # fmt: skip
        for limb in truth["limbs"]:
            assert set(limb["joints"]) <= set(truth["joint_names"])
            assert len(limb["colour_rgb"]) == 3 and limb["length_px"] > 0
        np.testing.assert_allclose(truth["joints_xy"], clip.joints_TJ2, atol=1e-3)


def test_every_gait_repeats_after_a_cycle():
    phase = np.array([0.3, 0.3 + 2 * np.pi])
    for gait in GAITS:
        joints = gait.pose(BODY_PLANS[gait.kind], phase)
        assert set(joints) >= set(BODY_PLANS[gait.kind].joint_names)
        for position in joints.values():
            np.testing.assert_allclose(position[0], position[1], atol=1e-9)


@pytest.mark.parametrize("frames", [1, 5])
def test_short_and_small_clips_draw(frames):
    clip = draw_clip(0, num_frames=frames, height=16, width=16)
    assert clip.frames_THWC.shape == (frames, 16, 16, 3)


@pytest.mark.parametrize(
    ("start", "end"), [((20.3, 11.0), (41.7, 30.2)), ((30.0, 20.0), (30.0, 20.0)), ((3, 3), (9, 3))]
)
def test_coverage_sums_to_the_area_of_the_capsule(start, end):
    start, end = np.array(start, float), np.array(end, float)
    radius = 2.5
    _, coverage, _ = capsule_coverage(start, end, radius, height=48, width=64)
    area = np.pi * radius**2 + 2 * radius * np.hypot(*(end - start))
    assert coverage.sum() == pytest.approx(area, rel=0.02)


def test_coverage_equals_a_supersampled_capsule():
    start, end, radius, fine = np.array([8.2, 20.7]), np.array([25.4, 9.1]), 4.3, 16
    window, coverage, _ = capsule_coverage(start, end, radius, height=32, width=40)
    y, x = (np.mgrid[0 : 32 * fine, 0 : 40 * fine] + 0.5) / fine
    points = np.stack([x, y], axis=-1) - start
    axis = end - start
    nearest = np.clip(points @ axis / (axis @ axis), 0, 1)[..., None] * axis
    inside = np.linalg.norm(points - nearest, axis=-1) <= radius
    expected = inside.reshape(32, fine, 40, fine).mean(axis=(1, 3))
    whole = np.zeros((32, 40))
    whole[window] = coverage
    assert np.abs(whole - expected).max() < 0.15 and np.abs(whole - expected).mean() < 0.005


def test_a_capsule_outside_the_frame_touches_nothing():
    for place in (-40.0, 100.0):
        spot = np.array([place, place])
        _, coverage, _ = capsule_coverage(spot, spot + 3, 2.0, height=32, width=32)
        assert coverage.size == 0 or coverage.max() == 0


def test_noise_is_smooth_and_bounded():
    noise = smooth_noise(np.random.default_rng(0), 64, 96, cell=16)
    assert noise.shape == (64, 96) and np.abs(noise).max() < 1.5
    assert noise.std() > 0.1
    assert np.abs(np.diff(noise, axis=1)).mean() < 0.3 * noise.std()


def test_scrolling_by_whole_pixels_is_a_slice():
    texture = np.random.default_rng(0).random((4, 20, 3))
    assert np.array_equal(scrolled(texture, 5.0, 10), texture[:, 5:15])
    np.testing.assert_allclose(
        scrolled(texture, 5.5, 10), (texture[:, 5:15] + texture[:, 6:16]) / 2
    )
