"""Captions and videos in two text files, line by line: `prompts.txt` and `videos.txt`.

The layout that the trainers of CogVideo and finetrainers read.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stages.clips.metadata_folder import FieldsOf, MetadataFile

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
    texts, names = _lines(captions), _lines(videos)
    if len(texts) != len(names):
        raise ValueError(
            f"{captions} has {len(texts)} lines and {videos} has {len(names)}; line N of the one "
            "belongs to line N of the other, so that they must have as many"
        )
    for path, lines in ((captions, texts), (videos, names)):
        blank = [str(number) for number, line in enumerate(lines, start=1) if not line.strip()]
        if blank:
            raise ValueError(
                f"{path} has blank lines ({', '.join(blank[:5])}{', …' if blank[5:] else ''}), "
                "which some programs count and others leave out; take the clips without caption "
                "out of both files"
            )
    return MetadataFile.of_rows(videos, _rows(texts, names))


def _lines(path: Path) -> list[str]:
    """Without blank ones at the end; a byte that is not UTF-8 spoils its own line alone."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return text.rstrip().replace("\r\n", "\n").split("\n") if text.strip() else []


def _rows(texts: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, FieldsOf]]:
    for number, (text, name) in enumerate(zip(texts, names, strict=True), start=1):
        yield f"line {number}", partial(_fields, text, name.strip())


def _fields(text: str, name: str) -> dict[str, Any]:
    return {"file_name": name, "caption": text}
