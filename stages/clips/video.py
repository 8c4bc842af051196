"""Video files in and out through PyAV: the only place that decodes or encodes.

Used by `stages.clips.loading` and `probing`, the demo's generator, and whatever writes a video.
"""

import io
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from stages.clips.limits import MAX_FRAME_PIXELS
from stages.clips.video_source import VideoSource, open_source

# Legend: T frame, H W pixels, C colour (RGB).

_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,h264,hevc,m4v"
# FFmpeg guesses the container from the content; a playlist named .mp4 could otherwise make it open
# other files or addresses.

_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""How libswscale converts between RGB and YUV. Without the last two flags its rounding depends on
the processor's instruction set (values differ by up to 4 of 255 between SSE2, AVX2 and none)."""


class VideoError(ValueError):
    """A file that cannot be decoded as video."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One decoded frame, upright."""

    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    time: Fraction
    """Seconds at which it appears; the first frame's need not be 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What the container says of its first real video stream."""

    fps: Fraction
    time_tick: Fraction
    """Seconds to which times are rounded in the file."""
    rotation: int
    """Degrees counter-clockwise, a multiple of 90, by which decoded frames were turned upright."""
    pixel_aspect: float
    """Width over height of a pixel of the upright frame."""
    stated_frames: int
    """How many frames the headers promise; 0 when they do not say."""


@contextmanager
def open_stream(source: VideoSource) -> Iterator[tuple[Any, Any, Fraction]]:
    """Open a video without decoding: the container, its first real video stream, frames/s.

    Raises:
        VideoError: Not a video, no video stream, no known codec, no rate, or giant frames.
    """
    with ExitStack() as stack:
        try:
            stream_in = stack.enter_context(open_source(source))
            container = stack.enter_context(
                av.open(
                    stream_in,
                    options={"format_whitelist": _FORMATS},
                    # A title in another encoding is no reason to refuse the frames.
                    metadata_errors="replace",
                )
            )
        except (av.error.FFmpegError, OSError, MemoryError) as error:
            raise VideoError(f"cannot be opened as video: {_words(error)}") from error
        stream = _first_video_stream(container)
        context = stream.codec_context
        if context is None:
            raise VideoError("the video's codec is not known here")
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise VideoError(
                f"frames of {context.width}x{context.height} pixels; "
                f"at most {MAX_FRAME_PIXELS:,} pixels are decoded"
            )
        # The size can change later on; FFmpeg then refuses before it takes the memory.
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate
        if not rate or rate < 0:
            raise VideoError("the file does not say how many frames it has per second")
        yield container, stream, Fraction(rate)


@contextmanager
def open_video(source: VideoSource) -> Iterator[tuple[VideoInfo, Iterator[Frame]]]:
    """Open a video; frames are decoded as they are asked for, in the order they are shown.

    Raises:
        VideoError: As `open_stream`; also no frame, frames that change size, damaged data (the
            last two also while iterating).
    """
    with open_stream(source) as (container, stream, rate):
        frames = _decode(container, stream, rate)
        first, rotation = next(frames, (None, 0))
        if first is None:
            raise VideoError("the video stream holds no frame")
        aspect = float(stream.sample_aspect_ratio or 1)
        info = VideoInfo(
            fps=rate,
            time_tick=Fraction(stream.time_base or 0),
            rotation=rotation,
            pixel_aspect=1 / aspect if rotation % 180 else aspect,
            stated_frames=stream.frames,
        )
        yield info, _chain(first, frames)


def read_video(source: VideoSource) -> tuple[np.ndarray, float]:
    """Decode a whole video.

    Returns:
        uint8 [T, H, W, 3] frames, upright, and the frames per second the file states.

    Raises:
        VideoError: (a ValueError) the file cannot be decoded.
    """
    with open_video(source) as (info, frames):
        return np.stack([frame.image_HWC for frame in frames]), float(info.fps)


def write_video(path: Path, frames_THWC: np.ndarray, fps: float, *, crf: int = 17) -> None:
    """Write H.264 in yuv420p, which every player shows; the file appears whole or not at all.

    Args:
        path: Ends in .mp4; its folder is made when missing.
        frames_THWC: uint8 [T, H, W, 3], H and W even.
        fps: Frames per second.
        crf: x264's quality, 0 (lossless) to 51; 17 is visually lossless.

    Raises:
        ValueError: Shape, dtype, size or suffix do not fit.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"videos are written as .mp4, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = encode_video(frames_THWC, fps, crf=crf)
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(encoded)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def encode_video(frames_THWC: np.ndarray, fps: float, *, crf: int = 17) -> bytes:
    """The bytes of `write_video`'s file; equal frames give equal bytes."""
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
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {
            "crf": str(crf),
            "preset": "medium",
            # x264's output depends on the number of threads.
            "threads": "1",
            # x264's AVX-512 code for macroblock-tree rate control reads memory it never wrote, so
            # that quantisers, and pixels with them, would vary from call to call.
            "x264-params": "cpu-independent=1",
        }
        for image_HWC in frames_THWC:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
            frame = rgb.reformat(format="yuv420p", interpolation=_EXACT)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def _first_video_stream(container: Any) -> Any:
    attached_picture = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & attached_picture:
            return stream
    raise VideoError("the file holds no video stream")


def _decode(container: Any, stream: Any, rate: Fraction) -> Iterator[tuple[Frame, int]]:
    size: tuple[int, int] | None = None
    time: Fraction | None = None
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise VideoError("a frame is damaged")
            if size not in (None, (frame.height, frame.width)):
                raise VideoError(
                    f"frames change size from {size} to {(frame.height, frame.width)} (HxW)"
                )
            size = (frame.height, frame.width)
            time = _time_of(frame, time, rate)
            rotation = int(frame.rotation) % 360
            if rotation % 90:
                raise VideoError(f"the file turns its frames by {rotation} degrees, not by 90s")
            image_HWC = frame.to_ndarray(format="rgb24", interpolation=_EXACT)
            yield Frame(np.ascontiguousarray(np.rot90(image_HWC, rotation // 90)), time), rotation
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        raise VideoError(f"decoding failed: {_words(error)}") from error


def _time_of(frame: Any, previous: Fraction | None, rate: Fraction) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        return Fraction(0) if previous is None else previous + 1 / rate
    time = Fraction(frame.pts) * Fraction(frame.time_base)
    if previous is not None and time <= previous:
        raise VideoError(f"time stands still or runs backwards at {float(time):.3f} s")
    return time


def _chain(first: Frame, rest: Iterator[tuple[Frame, int]]) -> Iterator[Frame]:
    yield first
    for frame, _ in rest:
        yield frame


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
