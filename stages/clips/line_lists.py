"""Datasets with captions and videos in two parallel text files, `prompts.txt` and `videos.txt`.

This layout is also used by the trainers of CogVideo and finetrainers.
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
    LoadFields,
    RowLocation,
    UnchangedFile,
    check_length,
    line_at,
    lines_of,
)

CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_LISTS = ("videos.txt", "video.txt")


def open_line_lists(captions: Path, videos: Path) -> MetadataFile:
    """Open a dataset whose captions and videos are listed in separate files.

    Args:
        captions: File with a caption per line.
        videos: File with a video per line, relative to the file's folder.

    Raises:
        ValueError: The numbers of lines differ, or a line is blank, so that captions cannot be
            matched to videos reliably.
    """
    return MetadataFile.of_rows(videos, _PairedLines(captions, videos))


class _PairedLines:
    """Pairs line N of one file with line N of the other, ignoring blank lines at the end."""

    location_size = 3  # line number, and the line's offset in each file

    def __init__(self, captions: Path, videos: Path) -> None:
        self._files = UnchangedFile(captions), UnchangedFile(videos)

    def scan(self) -> Iterator[tuple[RowLocation, LoadFields]]:
        captions, videos = (file.path for file in self._files)
        with self._files[0].opened() as texts, self._files[1].opened() as names:
            found = _WithoutTrailingBlanks(texts), _WithoutTrailingBlanks(names)
            for number, (text, name) in enumerate(zip_longest(*found), start=1):
                if text is not None and name is not None:
                    yield (number, text[0], name[0]), partial(_fields, text[1], name[1])
        if found[0].count != found[1].count:
            raise ValueError(
                f"{captions} has {found[0].count} lines and {videos} has {found[1].count}; line N "
                "of one belongs to line N of the other, so the numbers of lines must be equal"
            )
        for path, lines in ((captions, found[0]), (videos, found[1])):
            if blank := lines.blank:
                raise ValueError(
                    f"{path} has blank lines ({', '.join(map(str, blank[:5]))}"
                    f"{', …' if blank[5:] else ''}), which some programs count and others skip; "
                    "remove clips without caption from both files"
                )

    def read(self, locations: Iterable[RowLocation]) -> Iterator[LoadFields]:
        with self._files[0].opened() as texts, self._files[1].opened() as names:
            for _, text_offset, name_offset in locations:
                yield partial(_fields, line_at(texts, text_offset), line_at(names, name_offset))


class _WithoutTrailingBlanks:
    """Iterates over offset and bytes of a file's lines, up to the last that is not blank."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0
        """Number of lines so far."""
        self.blank: list[int] = []
        """Line numbers of blank lines."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        pending_blanks: list[tuple[int, bytes]] = []
        for line in lines_of(self._file):
            if _is_blank(line[1]):
                pending_blanks.append(line)
                continue
            if pending_blanks:
                first = self.count + 1
                self.blank += range(first, first + len(pending_blanks))
                self.count += len(pending_blanks)
                yield from pending_blanks
                pending_blanks.clear()
            self.count += 1
            yield line


def _text(line: bytes) -> str:
    """Decode a line, without its line break; a byte that is not UTF-8 only affects this line."""
    text = line.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")


def _is_blank(line: bytes) -> bool:
    return not line[:1].isalnum() and not _text(line).strip()


def _fields(text: bytes, name: bytes) -> dict[str, Any]:
    check_length(text)
    check_length(name)
    return {"file_name": _text(name).strip(SPACES), "caption": _text(text)}
