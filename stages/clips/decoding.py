"""Opens and decodes video files with PyAV."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData

from stages.clips.colour import Colour, colour_of
from stages.clips.deinterlacing import Deinterlacer
from stages.clips.limits import MAX_FRAME_PIXELS
from stages.clips.orientation import Orientation, orientation_of
from stages.clips.video_source import VideoSource, open_source

# Legend: H W pixels, C colour (RGB).

_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,h264,hevc,m4v,mxf,dv,"
    "yuv4mpegpipe"
)
# FFmpeg detects the container from the content; without this whitelist a playlist named .mp4 could
# make it open other files or URLs.

_GUESSED_RATE_FORMATS = ("h264", "hevc", "m4v", "mpegvideo", "dv")
"""Formats whose average rate is made up by FFmpeg; the guessed rate, from the codec, is better."""

_INTERLACED_ORDERS = (2, 3, 4, 5)
"""Values of FFmpeg's AVFieldOrder: TT, BB, TB, BT."""


class VideoError(ValueError):
    """A file that cannot be decoded as video."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One decoded frame; pixels are converted on demand."""

    time: Fraction
    """Presentation time in seconds; the first frame's need not be 0."""
    duration: Fraction
    """Seconds; 0 if the file does not state it."""
    orientation: Orientation
    colour: Colour
    interlaced: bool
    """Whether the frame was interlaced before `open_video` deinterlaced it."""
    decoded: av.VideoFrame
    """The progressive frame."""

    @property
    def conversions(self) -> tuple[str, ...]:
        """Conversions applied to the image, other than orientation."""
        return (*(("deinterlaced",) if self.interlaced else ()), *self.colour.conversions)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        stored = self.decoded.height, self.decoded.width
        return stored[::-1] if self.orientation.rotation % 180 else stored

    def image(self) -> np.ndarray:
        """Upright uint8 [H, W, 3] image in SDR BT.709 RGB (see `stages.clips.colour`)."""
        return self.orientation.upright(self.colour.rgb(self.decoded))


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Properties of the decoded video stream."""

    fps: Fraction
    """Frame rate by the headers: an average, or a guess."""
    orientation: Orientation
    """Orientation applied to decoded frames."""
    pixel_aspect: float
    """Pixel width over height, of the upright frame."""
    stream: str | None
    """Which of several video streams it is; None if there is only one."""


@contextmanager
def open_stream(source: VideoSource) -> Iterator[tuple[Any, Any, Fraction]]:
    """Open a video without decoding; yields the container, the video stream and the stated fps.

    Of several streams, cover pictures aside, the default one is taken, or the first if none is.

    Raises:
        VideoError: Not a video, no video stream, an unknown codec, no frame rate, or frames over
            MAX_FRAME_PIXELS.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_source(source))
            if _is_webp(file):
                raise VideoError(
                    "WebP animations are not supported; convert them, for example to mp4"
                )
            container = stack.enter_context(
                av.open(
                    file,
                    options={"format_whitelist": _FORMATS},
                    # Metadata in an unexpected encoding must not prevent decoding.
                    metadata_errors="replace",
                )
            )
        except (av.error.FFmpegError, OSError, MemoryError) as error:
            raise VideoError(f"cannot be opened as video: {_error_text(error)}") from error
        stream = _video_streams(container)[0]
        context = stream.codec_context
        if context is None:
            raise VideoError("the video codec is not supported by the installed FFmpeg")
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise VideoError(
                f"frames of {context.width}x{context.height} pixels; "
                f"at most {MAX_FRAME_PIXELS:,} pixels are decoded"
            )
        # The frame size may change mid-stream; with this FFmpeg rejects it before allocating.
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        stream.thread_type = "AUTO"
        rates = (stream.average_rate, stream.guessed_rate)
        rate = next(
            filter(None, rates[::-1] if container.format.name in _GUESSED_RATE_FORMATS else rates),
            None,
        )
        if not rate or rate < 0:
            raise VideoError("the file does not state its frame rate")
        yield container, stream, Fraction(rate)


@contextmanager
def open_video(source: VideoSource) -> Iterator[tuple[VideoInfo, Iterator[Frame]]]:
    """Open a video and decode its frames lazily, in presentation order.

    Raises:
        VideoError: As `open_stream`; also no frame, a change of size or orientation, unsupported
            colours, or damaged data (also while iterating).
    """
    with open_stream(source) as (container, stream, rate):
        frames = _decode(container, stream, rate)
        first = next(frames, None)
        if first is None:
            raise VideoError("the video stream has no frames")
        aspect = float(stream.sample_aspect_ratio or 1)
        yield (
            VideoInfo(
                fps=rate,
                orientation=first.orientation,
                pixel_aspect=1 / aspect if first.orientation.rotation % 180 else aspect,
                stream=stream_name(container, stream),
            ),
            _chain(first, frames),
        )


def stream_name(container: Any, stream: Any) -> str | None:
    """Name of a stream among several video streams; None if it is the only one."""
    streams = sorted(other.index for other in _video_streams(container))
    if len(streams) == 1:
        return None
    return f"video stream {streams.index(stream.index) + 1} of {len(streams)}"


def interlaced_in_headers(stream: Any) -> bool:
    """Whether a stream is interlaced according to its headers."""
    context = stream.codec_context
    return context.field_order in _INTERLACED_ORDERS or context.name == "dvvideo"


def lacks_times(container: Any) -> bool:
    """Whether the format stores decoding times but no presentation times.

    FFmpeg then invents presentation times, which run backwards with B-frames.
    """
    return container.format.name == "avi"


def _is_webp(file: IO[bytes]) -> bool:
    start = file.read(12)
    file.seek(0)
    return start[:4] == b"RIFF" and start[8:] == b"WEBP"


def _video_streams(container: Any) -> list[Any]:
    """The video streams that are not cover pictures, the preferred one first."""
    flags = av.stream.Disposition
    streams = [
        stream for stream in container.streams.video if not stream.disposition & flags.attached_pic
    ]
    if not streams:
        raise VideoError("the file has no video stream")
    # A cover picture without the flag is a stream of one frame.
    return sorted(
        streams,
        key=lambda stream: (stream.frames == 1, not stream.disposition & flags.default),
    )


def _decode(container: Any, stream: Any, rate: Fraction) -> Iterator[Frame]:
    first: Frame | None = None
    size: tuple[int, int] | None = None
    time: Fraction | None = None
    deinterlacer: Deinterlacer[Frame] | None = None
    try:
        for decoded, stated in _decoded_frames(container, stream):
            if decoded.is_corrupt:
                raise VideoError("a frame is damaged")
            if size not in (None, (decoded.height, decoded.width)):
                raise VideoError(
                    f"frames change size from {size} to {(decoded.height, decoded.width)} (HxW)"
                )
            size = (decoded.height, decoded.width)
            time = _check_time(stated, time, rate)
            frame = _frame(decoded, time, stream)
            first = first or frame
            if frame.orientation != first.orientation:
                raise VideoError("frames change their orientation")
            if frame.interlaced and deinterlacer is None:
                deinterlacer = Deinterlacer(decoded)
            if deinterlacer is None:
                yield frame
                continue
            for progressive, original in deinterlacer.push(decoded, frame):
                yield replace(original, decoded=progressive)
        if deinterlacer is not None:
            for progressive, original in deinterlacer.flush():
                yield replace(original, decoded=progressive)
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        raise VideoError(f"decoding failed: {_error_text(error)}") from error


def _decoded_frames(container: Any, stream: Any) -> Iterator[tuple[av.VideoFrame, Fraction | None]]:
    """Frames in presentation order, each with its time in seconds or None if the file has none."""
    if not lacks_times(container):
        for decoded in container.decode(stream):
            stated = None if decoded.pts is None else decoded.pts * Fraction(decoded.time_base)
            yield decoded, stated
        return
    # Frames may be reordered, but the sorted presentation times equal the decoding times.
    times: deque[Fraction] = deque()
    for packet in container.demux(stream):
        if packet.dts is not None and packet.size:
            times.append(packet.dts * Fraction(packet.time_base))
        for decoded in packet.decode():
            yield decoded, times.popleft() if times else None


def _check_time(stated: Fraction | None, previous: Fraction | None, rate: Fraction) -> Fraction:
    if stated is None:
        return Fraction(0) if previous is None else previous + 1 / rate
    if previous is not None and stated <= previous:
        raise VideoError(f"frame times do not increase at {float(stated):.3f} s")
    return stated


def _frame(decoded: av.VideoFrame, time: Fraction, stream: Any) -> Frame:
    colour = colour_of(decoded)
    if colour.problem:
        raise VideoError(colour.problem)
    matrix = decoded.side_data.get(SideData.DISPLAYMATRIX)
    try:
        orientation = orientation_of(
            None if matrix is None else np.frombuffer(bytes(matrix), np.int32)
        )
    except ValueError as error:
        raise VideoError(str(error)) from error
    return Frame(
        time,
        (decoded.duration or 0) * Fraction(stream.time_base or 0),
        orientation,
        colour,
        bool(decoded.interlaced_frame),
        decoded,
    )


def _chain(first: Frame, rest: Iterator[Frame]) -> Iterator[Frame]:
    yield first
    yield from rest


def _error_text(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
