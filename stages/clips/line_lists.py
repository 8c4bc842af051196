"""Captions and videos in two text files, line by line: `prompts.txt` and `videos.txt`.

The layout that the trainers of CogVideo and finetrainers read.
"""

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from stages.clips.metadata_folder import MetadataFile
from stages.clips.rows import (
    SPACES,
    FieldsOf,
    Place,
    UnchangedFile,
    check_length,
    line_at,
    lines_of,
)

CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_LISTS = ("videos.txt", "video.txt")


def open_line_lists(captions: Path, videos: Path) -> MetadataFile:
    """The clips whose captions stand in one file and whose videos stand in another.

    Args:
        captions: A caption per line.
        videos: A video per line, relative to the file's folder.

    Raises:
        ValueError: The files have other numbers of lines, or lines that are blank: which caption
            belongs to which video is then not certain.
    """
    return MetadataFile.of_rows(videos, _PairedLines(captions, videos))


class _PairedLines:
    """Line N of one file with line N of the other; blank ones at the end do not count."""

    place_size = 3  # number of the line, its offset in either file

    def __init__(self, captions: Path, videos: Path) -> None:
        self._files = UnchangedFile(captions), UnchangedFile(videos)

    def scan(self) -> Iterator[tuple[Place, FieldsOf]]:
        captions, videos = (file.path for file in self._files)
        with self._files[0].opened() as texts, self._files[1].opened() as names:
            found = _UpToLast(texts), _UpToLast(names)
            for number, (text, name) in enumerate(zip_longest(*found), start=1):
                if text is not None and name is not None:
                    yield (number, text[0], name[0]), partial(_fields, text[1], name[1])
        if found[0].count != found[1].count:
            raise ValueError(
                f"{captions} has {found[0].count} lines and {videos} has {found[1].count}; line N "
                "of the one belongs to line N of the other, so that they must have as many"
            )
        for path, lines in ((captions, found[0]), (videos, found[1])):
            if blank := lines.blank:
                raise ValueError(
                    f"{path} has blank lines ({', '.join(map(str, blank[:5]))}"
                    f"{', …' if blank[5:] else ''}), which some programs count and others leave "
                    "out; take the clips without caption out of both files"
                )

    def read(self, places: Iterable[Place]) -> Iterator[FieldsOf]:
        with self._files[0].opened() as texts, self._files[1].opened() as names:
            for _, at_text, at_name in places:
                yield partial(_fields, line_at(texts, at_text), line_at(names, at_name))


class _UpToLast:
    """Offset and bytes of a file's lines up to the last that is not blank."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0
        """Lines so far."""
        self.blank: list[int] = []
        """Numbers of those that are blank."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        after_last: list[tuple[int, bytes]] = []
        for line in lines_of(self._file):
            if _is_blank(line[1]):
                after_last.append(line)
                continue
            if after_last:
                first = self.count + 1
                self.blank += range(first, first + len(after_last))
                self.count += len(after_last)
                yield from after_last
                after_last.clear()
            self.count += 1
            yield line


def _text(line: bytes) -> str:
    """Without the line break; a byte that is not UTF-8 spoils its own line alone."""
    text = line.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")


def _is_blank(line: bytes) -> bool:
    return not line[:1].isalnum() and not _text(line).strip()


def _fields(text: bytes, name: bytes) -> dict[str, Any]:
    check_length(text)
    check_length(name)
    return {"file_name": _text(name).strip(SPACES), "caption": _text(text)}
