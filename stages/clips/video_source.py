"""Sources of encoded videos: bytes in memory, a file, or a part of a file."""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO


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
