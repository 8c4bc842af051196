"""Whole frames of interlaced ones, by FFmpeg's bwdif."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Generic, TypeVar

import av
from av.filter import Graph

Told = TypeVar("Told")


class Deinterlacer(Generic[Told]):
    """Makes each interlaced frame of its first field and its neighbours; leaves whole frames.

    Frames come out one for one and in order, one frame late; what was told of each comes with it.
    """

    def __init__(self, frame: av.VideoFrame) -> None:
        """
        Args:
            frame: Of the size and the format of all.
        """
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=Fraction(1, 1000),  # no time is read
        )
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
        self._graph.link_nodes(source, bwdif, self._graph.add("buffersink")).configure()
        self._told: deque[Told] = deque()

    def push(self, frame: av.VideoFrame, told: Told) -> Iterator[tuple[av.VideoFrame, Told]]:
        """Put a frame in; those that are ready come out."""
        frame.pts = None  # it may be missing or rise unevenly
        self._told.append(told)
        self._graph.vpush(frame)
        return self._ready()

    def flush(self) -> Iterator[tuple[av.VideoFrame, Told]]:
        """The frames that are left, after the last one was put in."""
        self._graph.vpush(None)
        return self._ready()

    def _ready(self) -> Iterator[tuple[av.VideoFrame, Told]]:
        while True:
            try:
                frame = self._graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            yield frame, self._told.popleft()
