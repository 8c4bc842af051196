"""Deinterlacing with FFmpeg's bwdif filter."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Generic, TypeVar

import av
from av.filter import Graph

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
