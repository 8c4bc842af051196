"""Where an encoded video lies: in memory, in a file, or in a part of one; read on demand."""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class FilePart:
    """Some consecutive bytes of a file, such as a member of a tar."""

    path: Path
    offset: int
    size: int


VideoSource = bytes | Path | FilePart
"""The encoded video, or where it lies."""


def open_source(source: VideoSource) -> IO[bytes]:
    """The video as a file that can be read and sought in; nothing is read yet.

    Raises:
        OSError: It cannot be opened, or the path is no regular file.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, FilePart):
        return io.BufferedReader(_Window(source))
    # A pipe or a device would be waited for, or read for ever.
    if not stat.S_ISREG(source.stat().st_mode):
        raise OSError("it is no file")
    return source.open("rb")


class _Window(io.RawIOBase):
    """A part of a file as if it were a file of its own."""

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
            raise ValueError(f"position {origin + offset} lies before the start")
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
