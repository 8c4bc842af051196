"""Decodes the frames of a video: upright, progressive, in presentation order."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Any, Generic, TypeVar

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type as SideData

from stages.clips.video.colour import Colour, colour_of
from stages.clips.video.streams import (
    VideoError,
    VideoSource,
    error_text,
    lacks_times,
    open_stream,
    stream_name,
)

# Legend: T frame, H W pixels, C colour (RGB).

_SCALE_TOLERANCE = 0.01
"""Scales within 1% count as equal. FFmpeg's demuxer uses the same threshold, above which it
converts unequal scales to a pixel aspect ratio."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight orientations on the pixel grid: mirrored first, then rotated."""

    rotation: int = 0
    """Degrees counter-clockwise: 0, 90, 180 or 270."""
    mirrored: bool = False
    """Whether the frame is flipped horizontally, before the rotation."""

    def upright(self, image_HWC: np.ndarray) -> np.ndarray:
        """Apply the orientation; returns a contiguous array."""
        mirrored_HWC = image_HWC[:, ::-1] if self.mirrored else image_HWC
        return np.ascontiguousarray(np.rot90(mirrored_HWC, self.rotation // 90))


def orientation_of(matrix: np.ndarray | None) -> Orientation:
    """The orientation given by a 3x3 display matrix; None stands for the identity.

    Args:
        matrix: int32 [9], (a, b, u, c, d, v, x, y, w) as in FFmpeg and ISO/IEC 14496-12: a stored
            (X, Y) is shown at (aX + cY + x, bX + dY + y). Translation and scale are ignored.

    Raises:
        ValueError: The matrix shears, rotates by another angle, is projective or degenerate.
    """
    if matrix is None:
        return Orientation()
    a, b, u, c, d, v, _, _, _ = (int(value) for value in matrix)
    if u or v:
        raise ValueError("the file's display matrix has a perspective component")
    if a and d and not b and not c:
        found = {
            (True, True): (0, False),
            (False, False): (180, False),
            (False, True): (0, True),
            (True, False): (180, True),
        }[a > 0, d > 0]
    elif b and c and not a and not d:
        found = {
            (True, False): (90, False),
            (False, True): (270, False),
            (True, True): (90, True),
            (False, False): (270, True),
        }[c > 0, b > 0]
        if not math.isclose(abs(c), abs(b), rel_tol=_SCALE_TOLERANCE):
            raise ValueError("the file's display matrix rotates frames and scales them unevenly")
    else:
        raise ValueError(
            "the file's display matrix "
            f"({a / 65536:g}, {b / 65536:g}, {c / 65536:g}, {d / 65536:g}) is neither a rotation "
            "by a multiple of 90 degrees nor a mirroring"
        )
    return Orientation(*found)


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
        """Upright uint8 [H, W, 3] image in SDR BT.709 RGB (see `stages.clips.video.colour`)."""
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
            chain((first,), frames),
        )


def read_video(source: VideoSource) -> tuple[np.ndarray, float]:
    """Decode a whole video.

    Returns:
        Upright uint8 [T, H, W, 3] frames, and the frames per second stated by the file.

    Raises:
        VideoError: (a ValueError) the file cannot be decoded.
    """
    with open_video(source) as (info, frames):
        return np.stack([frame.image() for frame in frames]), float(info.fps)


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
        raise VideoError(f"decoding failed: {error_text(error)}") from error


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


Item = TypeVar("Item")


class Deinterlacer(Generic[Item]):
    """Deinterlaces frames from their first field and their neighbours; keeps progressive ones.

    Yields one frame per input frame, in order and with a delay of one, together with the item that
    was pushed with it.
    """

    def __init__(self, frame: av.VideoFrame) -> None:
        """
        Args:
            frame: A frame with the size and format of all frames.
        """
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=Fraction(1, 1000),  # times are not used
        )
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
        self._graph.link_nodes(source, bwdif, self._graph.add("buffersink")).configure()
        self._items: deque[Item] = deque()

    def push(self, frame: av.VideoFrame, item: Item) -> Iterator[tuple[av.VideoFrame, Item]]:
        """Add a frame; yields the frames that are ready."""
        frame.pts = None  # it may be missing or irregular
        self._items.append(item)
        self._graph.vpush(frame)
        return self._ready()

    def flush(self) -> Iterator[tuple[av.VideoFrame, Item]]:
        """Yield the remaining frames, after the last `push`."""
        self._graph.vpush(None)
        return self._ready()

    def _ready(self) -> Iterator[tuple[av.VideoFrame, Item]]:
        while True:
            try:
                frame = self._graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            yield frame, self._items.popleft()
