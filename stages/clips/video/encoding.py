"""Writes H.264 videos, and copies videos without their tags."""

import io
import secrets
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from cache_schema.atomic_io import add_path_to_errors
from stages.clips.video.colour import EXACT
from stages.clips.video.streams import VideoError

# Legend: T frame, H W pixels, C colour (RGB).


def write_video(path: Path, frames_THWC: np.ndarray, fps: float, *, crf: int = 17) -> None:
    """Write H.264 in yuv420p, which every player supports; the file is written atomically.

    Frames are stored in BT.709 and tagged as such: without tags players guess by the height.

    Args:
        path: Must end in .mp4; its folder is created if missing.
        frames_THWC: uint8 [T, H, W, 3], H and W even.
        fps: Frames per second.
        crf: Constant rate factor of x264, 0 (lossless) to 51; 17 is visually lossless.

    Raises:
        ValueError: Invalid shape, dtype, size or suffix.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"videos are written as .mp4, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = encode_video(frames_THWC, fps, crf=crf)
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(8)}")
    try:
        with add_path_to_errors(path):
            temporary.write_bytes(encoded)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def encode_video(
    frames_THWC: np.ndarray, fps: float, *, crf: int = 17, tags: Mapping[str, str] | None = None
) -> bytes:
    """Encode a video as in `write_video`; equal frames and tags give equal bytes.

    Args:
        frames_THWC: uint8 [T, H, W, 3], H and W even.
        fps: Frames per second.
        crf: As for `write_video`.
        tags: MP4 tags that FFmpeg knows, such as title and comment.
    """
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3], got {frames_THWC.dtype} {frames_THWC.shape}"
        )
    num_frames, height, width, _ = frames_THWC.shape
    if num_frames == 0 or height % 2 or width % 2:
        raise ValueError(
            f"yuv420p needs at least one frame of even size, got {num_frames} of {height}x{width}"
        )
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        container.metadata.update(tags or {})
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        stream.options = {
            "crf": str(crf),
            "preset": "medium",
            # x264's output depends on the number of threads.
            "threads": "1",
            # x264's AVX-512 code for macroblock-tree rate control reads uninitialised memory, so
            # that quantisers, and thus pixels, would vary from call to call.
            "x264-params": "cpu-independent=1",
        }
        for image_HWC in frames_THWC:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
            frame = rgb.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=EXACT
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def copy_without_tags(source: Path, target: Path) -> None:
    """Copy the picture of a video without its tags, its sound and whatever else the file holds.

    Packets are copied as they are: the pixels and their times do not change.

    Args:
        source: A file with a video stream.
        target: Written in the container that its suffix names, such as .mp4 or .webm; replaced if
            it exists.

    Raises:
        VideoError: The source cannot be read, or the container cannot hold its stream.
    """
    try:
        options = {"fflags": "+bitexact"}
        with av.open(source) as read, av.open(target, "w", options=options) as write:
            stream = write.add_stream_from_template(read.streams.video[0])
            stream.metadata.clear()
            for packet in read.demux(read.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    write.mux(packet)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise VideoError(f"{source} cannot be copied: {error}") from error
