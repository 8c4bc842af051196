import av
import numpy as np
import pytest

from stages.clips import ClipProbe, ClipSkipped, load_clip, probe_clip


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


def test_nothing_is_decoded(tools, config, monkeypatch):
    video = tools.encode(tools.counting_frames(9))
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
