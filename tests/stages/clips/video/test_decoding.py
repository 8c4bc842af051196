"""Videos with reordered frames, fields, or several streams."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.filter import Graph

from stages.clips import ClipSkipped, load_clip, open_dataset, probe_clip, read_video
from stages.clips.dataset.keys import VIDEO_SUFFIXES
from stages.clips.video.decoding import open_video


def decoding_order(video: bytes) -> list[int]:
    """The places at which frames are shown, in the order of their packets, as H.264 tells."""
    with av.open(io.BytesIO(video)) as container:
        return [packet.pts for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("pyramid", ["none", "normal"])
@pytest.mark.parametrize("fps", [8, 24])
def test_frames_of_an_avi_with_b_frames_come_in_their_order(pyramid, fps, tools, config):
    options = {
        **tools.B_FRAMES,
        "x264-params": f"{tools.B_FRAMES['x264-params']}:b-pyramid={pyramid}",
    }
    frames = tools.counting_frames(40)
    in_mp4 = tools.encode(frames, fps=24, pix_fmt="yuv420p", options=options)
    order = decoding_order(in_mp4)
    assert order != sorted(order)  # there are B-frames
    video = tools.encode(frames, fps=24, container="avi", pix_fmt="yuv420p", options=options)
    seen, rate = read_video(video)
    assert rate == 24 and np.array_equal(seen, read_video(in_mp4)[0])
    clip = load_clip(tools.record_of(video), config(fps=float(fps)))
    assert tools.numbers_of(clip.frames_THWC) == list(range(0, 25, 3) if fps == 8 else range(9))


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_frames_of_an_avi_of_other_codecs_come_in_their_order(codec, b_frames, tools, config):
    options = {"bf": b_frames, "qmin": "1", "qmax": "1"}
    video = tools.encode(
        tools.counting_frames(40),
        codec=codec,
        fps=24,
        container="avi",
        pix_fmt="yuv420p",
        options=options,
    )
    assert tools.numbers_of(read_video(video)[0]) == list(range(40))
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == list(range(0, 25, 3))


@pytest.mark.parametrize("container", ["h264", "m4v", "mpeg2video"])
def test_a_bare_stream_counts_its_frames(container, tools, config):
    codec = {"h264": "libx264", "m4v": "mpeg4", "mpeg2video": "mpeg2video"}[container]
    video = tools.encode(
        tools.counting_frames(40),
        codec=codec,
        fps=24,
        container=container,
        pix_fmt="yuv420p",
        options=tools.B_FRAMES if codec == "libx264" else {"bf": "2"},
    )
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == list(range(0, 25, 3))


def moving_bar(time: float) -> np.ndarray:
    """A white bar on black, 4 pixels to the right every 1/50 s."""
    image = np.zeros((64, 96, 3), np.uint8)
    left = 8 + round(200 * time)
    image[:, left : left + 16] = 255
    return image


def interlaced_video(num_frames: int, codec: str, first: str) -> bytes:
    """25 frames/s of two fields, 1/50 s apart; `first` is tff (the upper one first) or bff."""
    out = io.BytesIO()
    marker = Graph()  # PyAV alone cannot mark frames
    source = marker.add_buffer(
        width=96, height=64, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25)
    )
    nodes = (source, marker.add("setfield", first), marker.add("buffersink"))
    marker.link_nodes(*nodes).configure()
    with av.open(out, "w", format="mpegts") as muxer:
        stream: Any = muxer.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.options = {
            "libx264": {"crf": "1", "threads": "1", "x264-params": f"{first}=1"},
            "mpeg2video": {"flags": "+ildct+ilme", "qmin": "1", "qmax": "1"},
        }[codec]
        for index in range(num_frames):
            image, later = moving_bar(index / 25), moving_bar(index / 25 + 1 / 50)
            second = slice(1 if first == "tff" else 0, None, 2)
            image[second] = later[second]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            marker.vpush(frame)
            muxer.mux(stream.encode(marker.vpull()))
        muxer.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("first", ["tff", "bff"])
def test_interlaced_frames_show_one_moment(codec, first, tools, config):
    record = tools.record_of(interlaced_video(12, codec, first))
    clip = load_clip(record, config(fps=25.0, height=64, width=96))
    for index, frame_HWC in enumerate(clip.frames_THWC):
        truth = moving_bar(index / 25)[..., 0].astype(int)
        error = np.abs(frame_HWC[8:-8, :, 0].astype(int) - truth[8:-8])
        # Combed, 4 columns at each edge of the bar are wrong on every other line: on average
        # 255 * 8 / 96 / 2 = 10.6.
        assert error.mean() < 3, index
    assert clip.geometry.as_dict()["conversions"] == ["deinterlaced"]
    assert probe_clip(record, config(fps=25.0)).conversions == ("deinterlaced",)
    for read in (load_clip, probe_clip):
        with pytest.raises(ClipSkipped, match="interlaced") as caught:
            read(record, config(fps=25.0, interlaced="skip"))
        assert caught.value.reason == "interlaced"


def test_deinterlacing_keeps_every_frame_and_its_time():
    with open_video(interlaced_video(12, "libx264", "tff")) as (_, frames):
        times = [frame.time for frame in frames]
    assert [time - times[0] for time in times] == [Fraction(index, 25) for index in range(12)]


def several_streams(tools, *streams: tuple[np.ndarray, str, int], container="matroska") -> bytes:
    """Frames, codec and disposition of each."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as muxer:
        made = []
        for frames, codec, disposition in streams:
            stream: Any = muxer.add_stream(codec, rate=8)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            made.append((stream, frames))
        for stream, frames in made:
            for image in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                muxer.mux(stream.encode(frame))
            muxer.mux(stream.encode())
    return out.getvalue()


DEFAULT, COVER = (int(getattr(av.stream.Disposition, name)) for name in ("default", "attached_pic"))


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [(0, DEFAULT, "2 of 2"), (DEFAULT, 0, "1 of 2"), (0, 0, "1 of 2")],
)
def test_of_several_streams_the_default_one_is_taken_and_named(first, second, taken, tools, config):
    rising = tools.counting_frames(12)
    video = several_streams(tools, (rising, "libx264", first), (rising + 100, "libx264", second))
    record = tools.record_of(video)
    clip = load_clip(record, config())
    start = 25 if taken.startswith("2") else 0
    assert tools.numbers_of(clip.frames_THWC) == list(range(start, start + 9))
    assert clip.geometry.as_dict()["conversions"] == [f"video stream {taken}"]
    assert probe_clip(record, config()).conversions == (f"video stream {taken}",)


def test_a_cover_picture_is_no_video(tools, config):
    frames = tools.counting_frames(12)
    cover = np.full((1, 64, 64, 3), 200, np.uint8)
    video = several_streams(tools, (cover, "mjpeg", COVER), (frames, "libx264", 0), container="mp4")
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == list(range(9))
    assert clip.geometry.conversions == ()


def test_a_webp_animation_is_named(tools, config):
    record = tools.record_of(b"RIFF\x10\x00\x00\x00WEBPVP8X" + bytes(16))
    with pytest.raises(ClipSkipped, match="WebP animations are not supported; convert"):
        load_clip(record, config())


CONTAINERS = {
    "mp4": ("mp4", "libx264"), "mov": ("mov", "libx264"), "m4v": ("mp4", "libx264"),
    "mkv": ("matroska", "libx264"), "webm": ("webm", "libvpx-vp9"), "avi": ("avi", "mpeg4"),
    "mpg": ("mpeg", "mpeg2video"), "mpeg": ("mpeg", "mpeg1video"), "3gp": ("3gp", "mpeg4"),
    "asf": ("asf", "mpeg4"), "wmv": ("asf", "wmv2"), "flv": ("flv", "libx264"),
    "ogv": ("ogg", "libvpx"), "ts": ("mpegts", "libx264"), "mts": ("mpegts", "libx264"),
    "m2ts": ("mpegts", "libx264"), "m2v": ("mpeg2video", "mpeg2video"),
    "vob": ("vob", "mpeg2video"), "mxf": ("mxf", "mpeg2video"), "dv": ("dv", "dvvideo"),
    "y4m": ("yuv4mpegpipe", "rawvideo"), "gif": ("gif", "gif"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_every_suffix_taken_for_a_video_is_decoded(suffix, tools, config, tmp_path):
    container, codec = CONTAINERS[suffix]
    height, width = (576, 720) if suffix == "dv" else (32, 48)
    video = tools.encode(
        tools.counting_frames(30, height, width),
        fps=25,
        container=container,
        codec=codec,
        pix_fmt="rgb8" if suffix == "gif" else "yuv420p",
    )
    tools.write_tar(tmp_path / "0.tar", [(f"a.{suffix}", video), ("a.txt", b"x")])
    (record,) = open_dataset(config(path=tmp_path / "0.tar")).shards[0].records()
    clip = load_clip(record, config())
    frames = [index * 25 // 8 for index in range(9)]
    # A gif of 256 colours has 8 greys; the others may be off by half a step.
    tolerance = 20 if suffix == "gif" else 2
    means = clip.frames_THWC.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, np.multiply(frames, 4), atol=tolerance)
    assert probe_clip(record, config()).conversions == clip.geometry.conversions


def test_a_gif_beside_another_video_is_its_preview(video, tools, config, tmp_path):
    tools.write_tar(tmp_path / "0.tar", [("a.gif", b"GIF89a"), ("a.mp4", video)])
    (record,) = open_dataset(config(path=tmp_path / "0.tar")).shards[0].records()
    assert len(load_clip(record, config()).frames_THWC) == 9


@pytest.mark.parametrize("suffix", ["webp", "rmvb"])
def test_suffixes_that_are_not_decoded_are_named(suffix, tools, config, tmp_path):
    tools.write_tar(tmp_path / "0.tar", [(f"a.{suffix}", b"x"), ("a.txt", b"a dog")])
    (record,) = open_dataset(config(path=tmp_path / "0.tar")).shards[0].records()
    assert f"{suffix} is not supported: convert it to mp4" in record.detail
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"a.{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"a.{suffix} is in an unsupported format"):
        open_dataset(config(path=tmp_path / "folder"))
