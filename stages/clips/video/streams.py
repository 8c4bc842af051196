"""Opens the video stream of bytes in memory, a file, or a part of a file."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av

MAX_FRAME_PIXELS = 1 << 26
"""Largest frame or mask: 67 million pixels, twice an 8K frame."""

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


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of bytes of a file, such as a member of a tar."""

    path: Path
    offset: int
    size: int


VideoSource = bytes | Path | FilePart
"""The encoded video or its location."""


def open_source(source: VideoSource) -> IO[bytes]:
    """Open a video as a seekable binary file.

    Raises:
        OSError: It cannot be opened, or the path is not a regular file.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, FilePart):
        return io.BufferedReader(_Window(source))
    # Opening a pipe could block, and reading a device might never end.
    if not stat.S_ISREG(source.stat().st_mode):
        raise OSError("it is not a regular file")
    return source.open("rb")


class VideoError(ValueError):
    """A file that cannot be decoded as video."""


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
            raise VideoError(f"cannot be opened as video: {error_text(error)}") from error
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


def error_text(error: BaseException) -> str:
    """The message of an error of FFmpeg or the system."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Window(io.RawIOBase):
    """Presents a part of a file as a separate file."""

    def __init__(self, part: FilePart) -> None:
        super().__init__()
        self._size = part.size
        self._start = part.offset
        self._position = 0
        self._file = io.FileIO(part.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"position {origin + offset} is before the start")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), max(0, self._size - self._position))
        self._file.seek(self._start + self._position)
        read = self._file.readinto(memoryview(buffer)[:count])
        self._position += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
