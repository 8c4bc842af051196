from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from stages.clips import ClipProbe, ClipRecord, ClipSkipped, SubjectPrompt, load_clip, probe_clip


def reason_of(record, config) -> str:
    with pytest.raises(ClipSkipped) as caught:
        load_clip(record, config)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize(
    ("source_fps", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (16, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (24, [0, 3, 6, 9, 12, 15, 18, 21, 24]),
        # 3.75 frames an instant: the one already shown
        (30, [0, 3, 7, 11, 15, 18, 22, 26, 30]),
        (Fraction(24000, 1001), [0, 2, 5, 8, 11, 14, 17, 20, 23]),
        (7.9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (8.1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_frames_are_those_shown_at_each_instant(tools, config, source_fps, expected):
    video = tools.encode(tools.counting_frames(40), fps=source_fps)
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == expected
    assert clip.geometry.source_fps == pytest.approx(float(source_fps))


def test_milliseconds_of_matroska_do_not_shift_the_frames(tools, config):
    video = tools.encode(tools.counting_frames(40), fps=24, container="matroska")
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == [0, 3, 6, 9, 12, 15, 18, 21, 24]


def test_null_fps_takes_frames_as_stored(tools, config):
    video = tools.encode(tools.counting_frames(20), fps=30)
    clip = load_clip(tools.record_of(video), config(fps=None))
    assert tools.numbers_of(clip.frames_THWC) == list(range(9))
    assert clip.geometry.sampling == "consecutive"


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_uneven_times_are_honoured(tools, config, container):
    # 16 frames/s on average; instants are 0, 125, 250, … 1000 ms.
    times = [0, 20, 130, 140, 240, 260, 370, 380, 490, 520, 600, 640, 740, 760, 870, 880, 990, 1020]
    video = tools.encode(
        tools.counting_frames(18), fps=16, container=container, times=times,
        options={"bf": "0"},
    )  # fmt: skip
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == [0, 1, 4, 6, 8, 10, 12, 14, 16]


def test_a_pause_is_skipped_rather_than_filled_with_copies(tools, config):
    times = [0, 60, 120, 180, 600, 660, 720, 780, 840, 900, 960]
    video = tools.encode(
        tools.counting_frames(11), fps=16, container="matroska", times=times,
        options={"bf": "0"},
    )  # fmt: skip
    assert reason_of(tools.record_of(video), config()) == "fps_too_low"


def test_too_slow_and_too_short_sources_are_told_apart(tools, config):
    slow = tools.encode(tools.counting_frames(20), fps=6)
    assert reason_of(tools.record_of(slow), config()) == "fps_too_low"
    short = tools.encode(tools.counting_frames(4), fps=8)
    assert reason_of(tools.record_of(short), config()) == "too_short"
    # 24 frames at 24/s last one second: instants 0 to 7, the ninth falls just after the end.
    ends = tools.encode(tools.counting_frames(24), fps=24)
    assert reason_of(tools.record_of(ends), config()) == "too_short"
    lasts = tools.encode(tools.counting_frames(25), fps=24)
    assert len(load_clip(tools.record_of(lasts), config()).frames_THWC) == 9


def test_files_that_are_no_video_are_undecodable(tools, config, tmp_path):
    whole = tools.encode(tools.counting_frames(20), container="mp4")
    mpegts = tools.encode(tools.counting_frames(20), container="mpegts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/a.mp4\n"
    (tmp_path / "a.mp4").write_bytes(whole)
    bad = {
        "garbage": bytes(range(256)) * 40,
        "only a header": whole[:40],
        "no packets": mpegts[:376],
        "playlist": playlist.encode(),
    }
    for name, video in bad.items():
        assert reason_of(tools.record_of(video), config()) == "undecodable", name
    assert reason_of(tools.record_of(tmp_path / "absent.mp4"), config()) == "undecodable"


def test_damage_inside_a_video_never_passes_silently(tools, config):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    whole = bytearray(tools.encode(frames, container="matroska"))
    whole[len(whole) // 3 : 2 * len(whole) // 3] = bytes(len(whole) // 3 + 1)[: len(whole) // 3]
    assert reason_of(tools.record_of(bytes(whole)), config()) in ("undecodable", "too_short")


@pytest.mark.parametrize("rotation", [90, 180, 270, -90])
def test_rotation_in_the_file_is_applied(tools, config, rotation):
    upright = tools.corner_frame(32, 48)
    turns = rotation // 90
    stored = np.rot90(upright, -turns)  # what must be turned counter-clockwise to stand upright
    video = tools.encode(np.repeat(stored[None], 9, axis=0), rotation=rotation)
    clip = load_clip(tools.record_of(video), config())
    assert np.abs(clip.frames_THWC[0].astype(int) - upright)[4:12, 4:20].max() < 12
    assert np.abs(clip.frames_THWC[0].astype(int) - upright)[20:28, 28:44].max() < 12
    assert clip.geometry.rotation == rotation % 360


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "container"),
    [
        ("libx264", "gray", "mp4"),
        ("libx264", "yuv420p10le", "mp4"),
        ("ffv1", "yuv444p", "matroska"),
        ("libvpx-vp9", "yuv420p", "webm"),
        ("mpeg4", "yuv420p", "avi"),
    ],
)
def test_pixel_formats_and_containers_keep_brightness(tools, config, codec, pix_fmt, container):
    frames = tools.counting_frames(12)
    video = tools.encode(frames, codec=codec, pix_fmt=pix_fmt, container=container)
    clip = load_clip(tools.record_of(video), config())
    means = clip.frames_THWC.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, frames[:9].mean(axis=(1, 2, 3)), atol=4)


def test_odd_sizes_are_brought_to_the_training_size(tools, config):
    video = tools.encode(tools.counting_frames(9, 33, 51))
    clip = load_clip(tools.record_of(video), config())
    assert clip.frames_THWC.shape == (9, 32, 48, 3) and clip.frames_THWC.dtype == np.uint8
    assert tools.numbers_of(clip.frames_THWC) == list(range(9))


def test_frames_of_one_pixel_fill_the_training_size(tools, config):
    video = tools.encode(
        tools.counting_frames(9, 1, 1), codec="ffv1", pix_fmt="yuv444p", container="matroska"
    )
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == list(range(9))
    assert np.ptp(clip.frames_THWC, axis=(1, 2)).max() == 0


def test_non_square_pixels_are_stretched_to_their_shape(tools, config):
    # 32 x 24 stored pixels, each twice as wide as high, show a 32 x 48 picture.
    narrow = tools.corner_frame(32, 24)
    video = tools.encode(np.repeat(narrow[None], 9, axis=0), pixel_aspect=Fraction(2, 1))
    clip = load_clip(tools.record_of(video), config())
    wide = tools.corner_frame(32, 48)
    assert np.abs(clip.frames_THWC[0].astype(int) - wide)[:, :20].mean() < 4
    assert (clip.geometry.scale_x, clip.geometry.scale_y) == (2.0, 1.0)


def test_a_prompt_follows_the_pixels(tools, config):
    # A white rectangle on black; its mask, box and centre must land where its pixels land.
    height, width = 64, 120
    image = np.zeros((height, width, 3), np.uint8)
    image[16:48, 40:72] = 255
    mask_HW = image[..., 0] > 0
    video = tools.encode(np.repeat(image[None], 9, axis=0), pix_fmt="yuv444p")
    prompts = {
        "mask": SubjectPrompt(mask_HW=mask_HW),
        "box": SubjectPrompt(box_xyxy=(40.0, 16.0, 72.0, 48.0)),
        "points": SubjectPrompt(
            points_xy=np.array([[56.0, 32.0], [2.0, 2.0]]), point_labels=np.array([1, 0])
        ),
    }
    clips = {
        kind: load_clip(tools.record_of(video, prompt), config())
        for kind, prompt in prompts.items()
    }
    seen_HW = clips["mask"].frames_THWC[0].mean(axis=-1) > 127
    ys, xs = np.nonzero(seen_HW)
    assert (clips["mask"].prompts[0].mask_HW != seen_HW).mean() < 0.02
    box = clips["box"].prompts[0].box_xyxy
    assert np.abs(np.subtract(box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))).max() <= 1
    points = clips["points"].prompts[0]
    assert points.point_labels.tolist() == [1]  # the other lies outside the crop
    np.testing.assert_allclose(points.points_xy[0], (xs.mean() + 0.5, ys.mean() + 0.5), atol=0.6)


@pytest.mark.parametrize(
    "prompt",
    [
        SubjectPrompt(box_xyxy=(0.0, 0.0, 5.0, 32.0)),
        SubjectPrompt(points_xy=np.array([[1.0, 16.0]]), point_labels=np.array([1])),
        SubjectPrompt(mask_HW=np.eye(32, 96, dtype=bool) & (np.arange(96) < 4)),
        SubjectPrompt(mask_HW=np.ones((16, 48), bool)),
    ],
    ids=["box", "points", "mask", "mask of another size"],
)
def test_prompts_outside_the_crop_leave_a_problem(tools, config, prompt):
    video = tools.encode(tools.counting_frames(9, 32, 96))
    clip = load_clip(tools.record_of(video, prompt), config())
    assert clip.prompts == () and clip.prompt_problem


def test_only_the_subjects_that_the_crop_cut_away_are_dropped(tools, config):
    # 32 x 96 to 32 x 48: columns 24 to 71 are left.
    video = tools.encode(tools.counting_frames(9, 32, 96))
    gone = SubjectPrompt(box_xyxy=(0.0, 0.0, 5.0, 32.0))
    left = SubjectPrompt(box_xyxy=(30.0, 4.0, 90.0, 20.0))
    record = ClipRecord(
        key="a",
        video=video,
        prompts=(gone, left),
        last_frame_prompts=(left, gone, left),
        phrase="the dog",
    )
    clip = load_clip(record, config())
    assert [prompt.box_xyxy for prompt in clip.prompts] == [(6.0, 4.0, 48.0, 20.0)]
    assert len(clip.last_frame_prompts) == 2
    assert clip.prompt_problem is None and clip.phrase == "the dog"
    nothing = load_clip(replace(record, prompts=(), last_frame_prompts=(gone,)), config())
    assert nothing.prompts == nothing.last_frame_prompts == ()
    assert nothing.prompt_problem is None


def test_a_mask_of_another_size_is_a_problem_even_beside_a_good_one(tools, config):
    video = tools.encode(tools.counting_frames(9, 32, 96))
    good, other = (SubjectPrompt(mask_HW=np.ones(size, bool)) for size in ((32, 96), (16, 48)))
    clip = load_clip(tools.record_of(video, good, other), config())
    assert clip.prompts == () and "16x48" in clip.prompt_problem


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (SubjectPrompt(mask_HW=np.ones((16, 48), bool)), "16x48"),
        (
            SubjectPrompt(points_xy=np.array([[20.0, 9], [48, 33]]), point_labels=np.array([1, 0])),
            "33",
        ),
        (SubjectPrompt(box_xyxy=(40.0, 4.0, 90.0, 20.0)), "middle of box"),
    ],
    ids=["mask", "points", "box"],
)
def test_prompts_made_on_a_video_of_another_size_are_told(tools, config, prompt, words):
    good = SubjectPrompt(box_xyxy=(6.0, 4.0, 60.0, 20.0))  # detectors go over the edge
    record = tools.record_of(tools.encode(tools.counting_frames(9)), good, prompt)
    clip = load_clip(record, config())
    assert clip.prompts == () and words in clip.prompt_problem
    record = replace(record, prompts=(good,), last_frame_prompts=(prompt,))
    clip = load_clip(record, config())
    assert clip.prompts == clip.last_frame_prompts == ()
    assert clip.prompt_problem.startswith("last_frame: ") and words in clip.prompt_problem


def test_prompts_keep_their_numbers_when_the_crop_takes_others(tools, config):
    gone = SubjectPrompt(box_xyxy=(0.0, 0.0, 3.0, 32.0), number=0)
    left = SubjectPrompt(box_xyxy=(10.0, 4.0, 30.0, 20.0), number=1)
    record = tools.record_of(tools.encode(tools.counting_frames(9)), gone, left)
    clip = load_clip(record, config(width=32))
    assert [prompt.number for prompt in clip.prompts] == [1]


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
    ],
)
def test_headers_tell_size_rate_and_length(tools, config, container, codec):
    video = tools.encode(
        tools.counting_frames(30), fps=24, container=container, codec=codec, pix_fmt="yuv420p"
    )
    probe = probe_clip(tools.record_of(video), config())
    assert probe == ClipProbe(width=48, height=32, fps=24.0, num_frames=30)


def test_nothing_is_decoded(video, tools, config, monkeypatch):
    monkeypatch.setattr("stages.clips.video.decoding._decode", None)
    assert probe_clip(tools.record_of(video), config()).num_frames == 9


def test_a_fragmented_file_that_does_not_say_its_length_is_taken(tools, config, tmp_path):
    path = tmp_path / "a.mp4"
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(str(path), "w", format="mp4", options=options) as muxer:
        stream = muxer.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.gop_size = 2
        for image in tools.counting_frames(9):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    record = tools.record_of(path)
    assert probe_clip(record, config()).num_frames in (None, 9)
    assert len(load_clip(record, config()).frames_THWC) == 9


@pytest.mark.parametrize("source_fps", [5, 8, 12, 24, 30])
@pytest.mark.parametrize("num_frames", [8, 9, 13, 14, 25, 26, 31])
def test_headers_and_decoding_agree_on_what_is_too_short_or_slow(
    tools, config, source_fps, num_frames
):
    record = tools.record_of(tools.encode(tools.counting_frames(num_frames), fps=source_fps))
    reasons = []
    for read in (probe_clip, load_clip):
        try:
            read(record, config())
            reasons.append(None)
        except ClipSkipped as skipped:
            reasons.append((skipped.reason, skipped.detail))
    assert reasons[0] == reasons[1]


def test_what_is_no_video_is_undecodable(tools, config, tmp_path):
    for video in (b"", b"no video", tmp_path / "absent.mp4", tmp_path):
        with pytest.raises(ClipSkipped) as caught:
            probe_clip(tools.record_of(video), config())
        assert caught.value.reason == "undecodable"
