import numpy as np
import pytest

from stages.clips import encode_video, read_video
from stages.demo import draw_clip
from stages.demo.figures import BODY_PLANS
from stages.video_scores.figures import count_swaps, figure_scores
from stages.video_scores.limb_labels import connected_pieces, label_limbs
from stages.video_scores.limb_regions import FigureRegions
from tests.stages.video_scores import corruptions
from tests.stages.video_scores.corruptions import FPS, Figure

# Legend: T frame, H W pixels, C colour (RGB), L limb, 2 x and y.

_SIZES = {"small": (64, 96), "large": (128, 192)}
_SEEDS = range(6)
"""Two figures of each kind; some are behind a post."""
_LIMBS = {
    "biped": ("right_shin", "left_forearm", "left_shin", "right_forearm"),
    "quadruped": (
        "right_hind_lower_leg",
        "left_front_lower_leg",
        "left_hind_lower_leg",
        "right_front_lower_leg",
    ),
    "arm": ("left_finger", "right_finger", "upper_link", "middle_link"),
}
"""Limbs to corrupt: nothing hangs from the first two of a figure except a foot."""


def after_compression(frames_THWC: np.ndarray) -> np.ndarray:
    return read_video(encode_video(frames_THWC, FPS))[0]


def scores_of(figure: Figure) -> dict[str, float]:
    return figure_scores(after_compression(figure.draw()), figure.kind, fps=FPS)


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["biped", "quadruped", "arm"])
def figure(request) -> Figure:
    """Small enough to stay in the frame when stretched."""
    return corruptions.figure(request.param, num_frames=13, height=128, width=192, scale=0.7)


@pytest.fixture(scope="module")
def clean(figure) -> dict[str, float]:
    return scores_of(figure)


@pytest.mark.parametrize("encoded", [False, True], ids=["raw", "mp4"])
@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("seed", _SEEDS)
def test_drawn_figures_have_almost_no_faults(seed, size, encoded):
    height, width = _SIZES[size]
    clip = draw_clip(seed, num_frames=17, height=height, width=width, fps=FPS)
    frames_THWC = after_compression(clip.frames_THWC) if encoded else clip.frames_THWC
    scores = figure_scores(frames_THWC, clip.kind, fps=FPS)
    # Of about 200 limbs in 17 frames, a few are judged wrongly when they go behind others.
    assert scores["limb_presence"] >= (0.95 if size == "small" else 0.98)
    # Each end of a limb is found to half a pixel, or one pixel in half-resolution chroma; limbs
    # that can be measured have a mean length of 0.2 figure sizes.
    assert scores["limb_length_error"] <= (2 if encoded else 1) / (0.2 * clip.size)
    # Single limbs of which compression leaves two pixels or less.
    assert scores["joint_gap"] <= 0.01
    assert scores["extra_pieces"] <= 0.02
    assert scores["side_swaps"] == 0
    assert 0.6 < scores["motion_amplitude"] < 2.0


@pytest.mark.parametrize("size", _SIZES)
def test_visible_limbs_are_found_and_hidden_ones_are_not(size):
    height, width = _SIZES[size]
    visible, found = [], []
    for seed in _SEEDS:
        clip = draw_clip(seed, num_frames=17, height=height, width=width, fps=FPS)
        plan = BODY_PLANS[clip.kind]
        frames_THWC = after_compression(clip.frames_THWC)
        figure = FigureRegions(label_limbs(frames_THWC, plan), plan)
        visible += clip.visible_TL.ravel().tolist()
        found += [key in figure.regions for key in np.ndindex(clip.visible_TL.shape)]
        # Compression hides half a pixel and more of each end of a limb.
        assert figure.size == pytest.approx(clip.size, rel=1.25 / (0.2 * clip.size))
    assert np.mean(np.array(found)[np.array(visible) > 0.5]) > 0.99
    assert np.mean(np.array(found)[np.array(visible) < 0.01]) < 0.05


def test_scores_do_not_depend_on_the_size_of_the_figure(figure, clean):
    seed = ("biped", "quadruped", "arm").index(figure.kind)
    larger = corruptions.figure(seed, num_frames=13, height=128, width=192, scale=0.95)
    scores = scores_of(larger)
    for name, tolerance in (("limb_presence", 0.03), ("limb_length_error", 0.06)):
        assert scores[name] == pytest.approx(clean[name], abs=tolerance)


def test_presence_falls_with_each_removed_limb(figure, clean):
    presence = [clean["limb_presence"]]
    for count in (1, 2, 4):
        scores = scores_of(corruptions.without(figure, *_LIMBS[figure.kind][:count]))
        presence.append(scores["limb_presence"])
        expected = 1 - count / len(figure.limbs)
        assert scores["limb_presence"] == pytest.approx(expected, abs=0.03)
    assert presence == sorted(presence, reverse=True)


def test_length_error_grows_with_stretching(figure, clean):
    names = _LIMBS[figure.kind][:2]
    errors = [clean["limb_length_error"]]
    errors += [
        scores_of(corruptions.stretched(figure, factor, *names))["limb_length_error"]
        for factor in (1.2, 1.5, 2.0)
    ]
    assert np.diff(errors).min() > 0.02, errors
    # Two of at most nine limbs that can be measured are twice as long.
    assert errors[-1] > 0.15


def test_joint_gap_grows_with_the_distance_of_a_detached_limb(figure, clean):
    names = _LIMBS[figure.kind][:2]
    near, far = (
        scores_of(corruptions.detached(figure, gap, *names))["joint_gap"] for gap in (0.1, 0.3)
    )
    # Two of at most 11 joints are open, not always in sight.
    caps = 2 / figure.size  # compression hides a pixel of each
    assert clean["joint_gap"] + 0.008 < near < (0.1 + caps) * 2 / 5
    assert near + 0.01 < far < (0.3 + caps) * 2 / 5


@pytest.mark.parametrize("seed", [0, 1, 5], ids=["biped", "quadruped", "arm"])
def test_side_swaps_grow_with_the_swaps(seed):
    figure = corruptions.figure(seed, num_frames=13, height=128, width=192)
    none, once, twice = (
        scores_of(corruptions.swapped_sides(figure, *frames))["side_swaps"]
        for frames in ((), (5,), (3, 9))
    )
    seconds = (figure.num_frames - 1) / FPS
    # Pairs that are hidden or close together at that time cannot show it.
    assert none == 0
    assert 0 < once <= 1.2 / seconds
    assert once < twice <= 2.4 / seconds


def test_extra_pieces_grow_with_doubled_limbs(figure, clean):
    chains = {
        "biped": (("left_thigh", "left_shin"), ("right_upper_arm", "right_forearm")),
        "quadruped": (
            ("left_hind_upper_leg", "left_hind_lower_leg"),
            ("right_front_upper_leg", "right_front_lower_leg"),
        ),
        "arm": (("left_finger",), ("right_finger",)),
    }[figure.kind]
    one, two = (
        scores_of(corruptions.doubled(figure, *chains[:count]))["extra_pieces"] for count in (1, 2)
    )
    assert clean["extra_pieces"] + 0.03 < one < two


@pytest.mark.parametrize("seed", [0, 1, 2], ids=["biped", "quadruped", "arm"])
def test_melting_is_penalised_by_its_strength(seed):
    figure = corruptions.figure(seed, num_frames=9, height=128, width=192)
    frames_THWC = figure.draw()
    blurred = [
        figure_scores(
            after_compression(corruptions.blurred(frames_THWC, sigma)), figure.kind, fps=FPS
        )
        for sigma in (1, 2, 4)
    ]
    presence = [scores["limb_presence"] for scores in blurred]
    assert presence == sorted(presence, reverse=True)
    assert presence[-1] < presence[0] - 0.04
    assert blurred[-1]["joint_gap"] > blurred[0]["joint_gap"]


def test_a_still_figure_has_no_motion(figure, clean):
    # The axis of the shortest limbs moves by a fraction of a pixel with the compression.
    assert scores_of(corruptions.frozen(figure))["motion_amplitude"] < 0.1
    still_THWC = np.repeat(figure.draw()[:1], 5, axis=0)
    assert figure_scores(still_THWC, figure.kind, fps=FPS)["motion_amplitude"] < 1e-9
    assert clean["motion_amplitude"] > 0.6


@pytest.mark.parametrize("kind", BODY_PLANS)
def test_without_a_figure_hardly_a_limb_is_present(kind):
    random = np.random.default_rng(0)
    noise_THWC = random.integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    white_THWC = np.full_like(noise_THWC, 255)
    for frames_THWC in (noise_THWC, white_THWC):
        assert figure_scores(frames_THWC, kind, fps=FPS)["limb_presence"] < 0.1
    grey_THWC = noise_THWC[..., :1].repeat(3, axis=-1) // 4 + 80
    scores = figure_scores(grey_THWC, kind, fps=FPS)
    assert scores.pop("limb_presence") == 0
    assert all(np.isnan(score) for score in scores.values()), scores


def test_one_frame_has_no_motion_to_measure():
    scores = figure_scores(
        draw_clip(0, num_frames=1, height=64, width=96).frames_THWC, "biped", fps=8
    )
    assert np.isnan(scores["motion_amplitude"]) and np.isnan(scores["side_swaps"])
    assert scores["limb_presence"] > 0.9


@pytest.mark.parametrize(
    ("frames_THWC", "fps", "message"),
    [
        (np.zeros((2, 8, 8, 3)), 8.0, r"uint8 \[T, H, W, 3\], got float64"),
        (np.zeros((8, 8, 3), dtype=np.uint8), 8.0, "uint8"),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), 0.0, "fps must be above 0, got 0"),
    ],
)
def test_invalid_input_is_rejected(frames_THWC, fps, message):
    with pytest.raises(ValueError, match=message):
        figure_scores(frames_THWC, "arm", fps=fps)


def test_pieces_are_those_of_a_flood_fill():
    labels_THW = np.random.default_rng(0).integers(-1, 2, (3, 12, 17)).astype(np.int8)
    expected_THW = np.full(labels_THW.shape, -1)
    for start in np.ndindex(labels_THW.shape):
        if labels_THW[start] < 0 or expected_THW[start] >= 0:
            continue
        number, stack = np.ravel_multi_index(start, labels_THW.shape), [start]
        while stack:
            t, y, x = pixel = stack.pop()
            inside = 0 <= y < labels_THW.shape[1] and 0 <= x < labels_THW.shape[2]
            if inside and labels_THW[pixel] == labels_THW[start] and expected_THW[pixel] < 0:
                expected_THW[pixel] = number
                stack += [(t, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert np.array_equal(connected_pieces(labels_THW), expected_THW)


@pytest.mark.parametrize("swapped_frames", [(), (5,), (3, 8), (6, 7)])
def test_swaps_of_crossing_points_are_counted(swapped_frames):
    phase_T = np.linspace(0, 3 * np.pi, 16)
    left_T2 = np.stack([0.3 * np.sin(phase_T), np.zeros(16)], axis=1)
    pairs_T22 = np.stack([left_T2, -left_T2], axis=1)
    for frame in swapped_frames:
        pairs_T22[frame:] = pairs_T22[frame:, ::-1]
    assert count_swaps(pairs_T22) == len(swapped_frames)
