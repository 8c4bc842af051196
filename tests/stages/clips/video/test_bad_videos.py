"""Damaged, malicious or unusual videos between two good clips."""

import io
import struct
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stages.clips import ClipSkipped, load_clip


def remuxed(video: bytes, container: str, *, title: str = "", **options: Any) -> bytes:
    """The same packets in a new file, whose title is in Latin-1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new"
        with (
            av.open(io.BytesIO(video)) as source,
            av.open(str(path), "w", format=container, metadata_encoding="latin-1", **options) as to,
        ):
            to.metadata["title"] = title
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        return path.read_bytes()


def faststart(tools: Any) -> bytes:
    """The index lies in front, so that a truncated file still opens."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    return remuxed(tools.encode(noise), "mp4", options={"movflags": "faststart"})


def without_frames(container: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as muxer:
        stream: Any = muxer.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        muxer.start_encoding()
    return out.getvalue()


def audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer:
        stream: Any = muxer.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        muxer.mux(stream.encode(sound))
        muxer.mux(stream.encode())
    return out.getvalue()


def uneven(tools: Any, container: str) -> bytes:
    times = [0, 20, 130, 140, 240, 260, 370, 380, 490, 520, 600, 640, 740, 760, 870, 880, 990, 1020]
    return tools.encode(
        tools.counting_frames(18), fps=16, container=container, times=times,
        options={"bf": "0"},
    )  # fmt: skip


def foreign_title(tools: Any) -> bytes:
    video = remuxed(tools.encode(tools.counting_frames(9)), "matroska", title="Bär")
    assert "Bär".encode("latin-1") in video
    return video


def changing_size(tools: Any) -> bytes:
    sizes = ((32, 48), (64, 96))
    return b"".join(
        tools.encode(tools.counting_frames(5, *size), container="mpegts", pix_fmt="yuv420p")
        for size in sizes
    )


def giant_frames(tools: Any) -> bytes:
    """A file whose header claims frames of 81 million pixels."""
    video = tools.encode(tools.counting_frames(9), codec="ffv1", pix_fmt="yuv444p", container="avi")
    return video.replace(struct.pack("<II", 48, 32), struct.pack("<II", 9_000, 9_000))


CASES: dict[str, tuple[Any, ...]] = {
    # The video, what becomes of it, part of the detail, and changes of the settings.
    "truncated mp4": (lambda t: t.encode(t.counting_frames(9))[:-200], "undecodable"),
    "truncated mp4 with its index in front": (
        lambda t: faststart(t)[: len(faststart(t)) * 2 // 3],
        "too_short",
        "truncated",
    ),
    "empty file": (lambda t: b"", "undecodable"),
    "zero frames in mp4": (lambda t: without_frames("mp4"), "undecodable"),
    "zero frames in matroska": (lambda t: without_frames("matroska"), "undecodable"),
    "audio only": (lambda t: audio_only(), "undecodable", "no video stream"),
    "variable frame rate in matroska": (lambda t: uneven(t, "matroska"), "works"),
    "variable frame rate in mp4": (lambda t: uneven(t, "mp4"), "works"),
    "matroska named mp4": (lambda t: t.encode(t.counting_frames(9), container="matroska"), "works"),
    "text named mp4": (lambda t: b"a caption", "undecodable", "cannot be opened"),
    "playlist named mp4": (
        lambda t: b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n",
        "undecodable",
        "cannot be opened",
    ),
    "picture named mp4": (
        lambda t: t.png(np.ones((32, 48), bool)),
        "undecodable",
        "cannot be opened",
    ),
    "frames of one pixel": (
        lambda t: t.encode(
            t.counting_frames(9, 1, 1), codec="ffv1", pix_fmt="yuv444p", container="matroska"
        ),
        "works",
    ),
    "odd sizes": (lambda t: t.encode(t.counting_frames(9, 33, 51)), "works"),
    "grayscale": (lambda t: t.encode(t.counting_frames(9), pix_fmt="gray"), "works"),
    "10 bit": (lambda t: t.encode(t.counting_frames(9), pix_fmt="yuv420p10le"), "works"),
    "rotated by metadata": (lambda t: t.encode(t.counting_frames(9), rotation=90), "works"),
    "40 frames where 49 are asked for": (
        lambda t: t.encode(t.counting_frames(40)),
        "too_short",
        "40 frames",
        {"num_frames": 49},
    ),
    "fewer frames a second than asked for": (
        lambda t: t.encode(t.counting_frames(9), fps=5),
        "fps_too_low",
        "5.000",
    ),
    "frames that change size": (changing_size, "undecodable", "change size", {"fps": None}),
    "a codec that nobody knows": (
        lambda t: t.encode(t.counting_frames(9)).replace(b"avc1", b"zzzz"),
        "undecodable",
    ),
    "title in another encoding": (foreign_title, "works"),
    "giant frames": (giant_frames, "undecodable", "9000x9000"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_video_is_recorded_and_its_neighbours_are_read(name, tools, between_good_clips):
    make, reason, *rest = CASES[name]
    words = rest[0] if rest else ""
    changes = rest[1] if len(rest) > 1 else {}
    [(key, found, detail)] = between_good_clips([("bad.mp4", make(tools))], **changes)
    assert (key, found) == ("bad", reason)
    assert reason == "works" or (detail and words in detail)


def test_frames_that_grow_over_the_limit_are_refused_by_the_decoder(tools, config, monkeypatch):
    monkeypatch.setattr("stages.clips.video.streams.MAX_FRAME_PIXELS", 32 * 48)
    with pytest.raises(ClipSkipped, match="decoding failed") as caught:
        load_clip(tools.record_of(changing_size(tools)), config(fps=None))
    assert caught.value.reason == "undecodable"


def test_a_source_without_end_is_given_up(tools, config, monkeypatch):
    monkeypatch.setattr("stages.clips.loading.MAX_DECODED_FRAMES", 20)
    video = tools.encode(tools.counting_frames(40), fps=24)
    with pytest.raises(ClipSkipped, match="first 20 frames") as caught:
        load_clip(tools.record_of(video), config())
    assert caught.value.reason == "undecodable"
    assert len(load_clip(tools.record_of(video), config(fps=12)).frames_THWC) == 9
