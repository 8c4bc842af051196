"""Video files opened and decoded through PyAV: their streams, times and frames."""

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
# FFmpeg guesses the container from the content; a playlist named .mp4 could otherwise make it open
# other files or addresses.

_RATELESS = ("h264", "hevc", "m4v", "mpegvideo", "dv")
"""Formats for which FFmpeg names a rate of its own making; the codec knows better."""

_INTERLACED_ORDERS = (2, 3, 4, 5)
"""FFmpeg's AVFieldOrder: TT, BB, TB, BT."""


class VideoError(ValueError):
    """A file that cannot be decoded as video."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One decoded frame; its pixels are converted when they are asked for."""

    time: Fraction
    """Seconds at which it appears; the first frame's need not be 0."""
    duration: Fraction
    """Seconds; 0 where the file does not say."""
    orientation: Orientation
    colour: Colour
    interlaced: bool
    """Whether it was, before `open_video` filled its lines."""
    decoded: av.VideoFrame
    """Progressive."""

    @property
    def conversions(self) -> tuple[str, ...]:
        """What `image` shows otherwise than the file has it, its orientation aside."""
        return (*(("deinterlaced",) if self.interlaced else ()), *self.colour.conversions)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        stored = self.decoded.height, self.decoded.width
        return stored[::-1] if self.orientation.rotation % 180 else stored

    def image(self) -> np.ndarray:
        """uint8 [H, W, 3], upright, as a standard display shows it (see `stages.clips.colour`)."""
        return self.orientation.upright(self.colour.rgb(self.decoded))


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What is known of the video stream that is decoded."""

    fps: Fraction
    """As the headers have it: an average, or a guess."""
    orientation: Orientation
    """By which decoded frames are turned upright."""
    pixel_aspect: float
    """Width over height of a pixel of the upright frame."""
    stream: str | None
    """Which of several video streams it is; None where there is one."""


@contextmanager
def open_stream(source: VideoSource) -> Iterator[tuple[Any, Any, Fraction]]:
    """Open a video without decoding: the container, its video stream, frames/s as stated.

    Of several streams that are no cover pictures, the one marked as default, else the first.

    Raises:
        VideoError: Not a video, no video stream, no known codec, no rate, or giant frames.
    """
    with ExitStack() as stack:
        try:
            stream_in = stack.enter_context(open_source(source))
            if _is_webp(stream_in):
                raise VideoError(
                    "WebP animations are not decoded; convert them, for example to mp4"
                )
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
        stream = _video_streams(container)[0]
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
        rates = (stream.average_rate, stream.guessed_rate)
        rate = next(
            filter(None, rates[::-1] if container.format.name in _RATELESS else rates), None
        )
        if not rate or rate < 0:
            raise VideoError("the file does not say how many frames it has per second")
        yield container, stream, Fraction(rate)


@contextmanager
def open_video(source: VideoSource) -> Iterator[tuple[VideoInfo, Iterator[Frame]]]:
    """Open a video; frames are decoded as they are asked for, in the order they are shown.

    Raises:
        VideoError: As `open_stream`; also no frame, frames that change size or orientation, colours
            that are not converted, damaged data (also while iterating).
    """
    with open_stream(source) as (container, stream, rate):
        frames = _decode(container, stream, rate)
        first = next(frames, None)
        if first is None:
            raise VideoError("the video stream holds no frame")
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
    """Which of a file's several video streams this is; None where it is the only one."""
    streams = sorted(other.index for other in _video_streams(container))
    if len(streams) == 1:
        return None
    return f"video stream {streams.index(stream.index) + 1} of {len(streams)}"


def interlaced_in_headers(stream: Any) -> bool:
    """Whether a stream's headers say that its frames are interlaced."""
    context = stream.codec_context
    return context.field_order in _INTERLACED_ORDERS or context.name == "dvvideo"


def lacks_times(container: Any) -> bool:
    """Whether the format stores when packets are decoded but not when frames are shown.

    FFmpeg makes times up for its frames; with B-frames these run backwards.
    """
    return container.format.name == "avi"


def _is_webp(stream_in: IO[bytes]) -> bool:
    start = stream_in.read(12)
    stream_in.seek(0)
    return start[:4] == b"RIFF" and start[8:] == b"WEBP"


def _video_streams(container: Any) -> list[Any]:
    """The real ones, the one to be decoded first."""
    flags = av.stream.Disposition
    streams = [
        stream for stream in container.streams.video if not stream.disposition & flags.attached_pic
    ]
    if not streams:
        raise VideoError("the file holds no video stream")
    # A cover that is not marked as one is a stream of one frame.
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
            time = _checked(stated, time, rate)
            frame = _frame(decoded, time, stream)
            first = first or frame
            if frame.orientation != first.orientation:
                raise VideoError("frames change the way in which they are to be turned")
            if frame.interlaced and deinterlacer is None:
                deinterlacer = Deinterlacer(decoded)
            if deinterlacer is None:
                yield frame
                continue
            for whole, before in deinterlacer.push(decoded, frame):
                yield replace(before, decoded=whole)
        if deinterlacer is not None:
            for whole, before in deinterlacer.flush():
                yield replace(before, decoded=whole)
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        raise VideoError(f"decoding failed: {_words(error)}") from error


def _decoded_frames(container: Any, stream: Any) -> Iterator[tuple[av.VideoFrame, Fraction | None]]:
    """Frames in the order they are shown, each with its time in seconds where the file gives it."""
    if not lacks_times(container):
        for decoded in container.decode(stream):
            stated = None if decoded.pts is None else decoded.pts * Fraction(decoded.time_base)
            yield decoded, stated
        return
    # Where frames are shown in another order than decoded, the times are the same, in their order.
    times: deque[Fraction] = deque()
    for packet in container.demux(stream):
        if packet.dts is not None and packet.size:
            times.append(packet.dts * Fraction(packet.time_base))
        for decoded in packet.decode():
            yield decoded, times.popleft() if times else None


def _checked(stated: Fraction | None, previous: Fraction | None, rate: Fraction) -> Fraction:
    if stated is None:
        return Fraction(0) if previous is None else previous + 1 / rate
    if previous is not None and stated <= previous:
        raise VideoError(f"time stands still or runs backwards at {float(stated):.3f} s")
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


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
