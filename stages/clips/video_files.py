"""Videos with their captions and masks beside them: `lion.mp4`, `lion.txt`, `lion.mask.png`."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from stages.clips.clip_members import record_of_members
from stages.clips.keys import KeyBook, has_video_suffix, videos_among
from stages.clips.limits import read_at_most
from stages.clips.records import BadRecord, ClipRecord

_COMPANION = re.compile(
    r"(?P<stem>.+?)\.(?P<suffix>txt|json|(?:last\.)?mask(?:\.[0-9]+)?\.png)", re.IGNORECASE
)

_MOST_JOINED = 256
"""Letters of suffixes to which more are joined one by one."""


@dataclass(frozen=True, slots=True)
class VideoWithFiles:
    """A video's files: itself, caption, JSON, masks."""

    key: str
    suffixes: tuple[str, ...]
    """What follows the key and a dot in the names of its files."""

    @property
    def files(self) -> dict[str, str]:
        """Names relative to the root by suffix, lower case; the first where there are several."""
        files: dict[str, str] = {}
        for suffix in self.suffixes:
            files.setdefault(suffix.lower(), f"{self.key}.{suffix}")
        return files

    @property
    def problem(self) -> str | None:
        """Names a second file under one suffix (`lion.txt`, `lion.TXT`)."""
        files = self.files
        for suffix in self.suffixes:
            known, name = files[suffix.lower()], f"{self.key}.{suffix}"
            if known != name:
                return f"both {PurePosixPath(known).name} and {PurePosixPath(name).name} are there"
        return None

    @property
    def video_name(self) -> str:
        """Of its first file that is a video, relative to the root."""
        files = self.files
        return files[videos_among(files)[0]]


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """Clips in the order of their keys: file names relative to the root, without video suffix.

    Of a clip its key and its files' suffixes are kept: one text that most clips share.
    """

    root: Path
    keys: tuple[str, ...]
    suffixes: tuple[str, ...]
    """Of each clip, with slashes between them."""
    captions_alone: tuple[str, ...]
    """Names of .txt files that lie beside no video of their name."""

    @classmethod
    def in_folder(cls, root: Path) -> "VideoFiles":
        """All videos in a folder and those below it; hidden files and folders are left out.

        Links to folders are followed; a folder that several lead to is looked through once.
        """
        found = _Found()
        seen: set[str] = set()
        for folder, below, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not _is_hidden(name))
            shown = sorted(name for name in names if not _is_hidden(name))
            found.add(os.path.relpath(folder, root), filter(has_video_suffix, shown), shown)
        return found.under(root)

    @classmethod
    def of_videos(cls, root: Path, videos: Iterable[Path]) -> "VideoFiles":
        """These videos, and what lies beside them."""
        by_folder: dict[Path, list[str]] = {}
        for video in videos:
            by_folder.setdefault(video.parent, []).append(video.name)
        found = _Found()
        for folder, names in by_folder.items():
            found.add(
                os.path.relpath(folder, root), names, sorted(p.name for p in folder.iterdir())
            )
        return found.under(root)

    @property
    def name(self) -> str:
        """What its parts are called."""
        return "videos"

    @property
    def num_with_caption(self) -> int:
        """Clips beside which a .txt or a .json lies."""
        return sum(
            count
            for suffixes, count in Counter(self.suffixes).items()
            if {"txt", "json"} & set(suffixes.lower().split("/"))
        )

    def __len__(self) -> int:
        return len(self.keys)

    def clip(self, row: int) -> VideoWithFiles:
        """One of the clips."""
        return VideoWithFiles(self.keys[row], tuple(self.suffixes[row].split("/")))

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """The clips from `start` up to `stop`, with their captions and masks read."""
        book = KeyBook()
        for clip in map(self.clip, range(start, stop)):
            if refusal := book.claim(clip.key):
                yield BadRecord(key=book.stand_in(clip.key), reason="bad_record", detail=refusal)
            elif clip.problem:
                yield BadRecord(key=clip.key, reason="bad_record", detail=clip.problem)
            else:
                files = {suffix: self.root / name for suffix, name in clip.files.items()}
                read, video = partial(_read, files), files.__getitem__
                yield record_of_members(clip.key, files, read=read, video=video)

    def num_bytes(self, start: int, stop: int) -> int:
        """Size of the videos of the clips from `start` up to `stop`."""
        return sum(
            path.stat().st_size
            for clip in map(self.clip, range(start, stop))
            for name in clip.files.values()
            if has_video_suffix(name) and (path := self.root / name).is_file()
        )


class _Found:
    """Clips while folders are gone through."""

    def __init__(self) -> None:
        self._suffixes: dict[str, str | list[str]] = {}
        """By key, with slashes between them; a list where they are many."""
        self._alone: list[str] = []

    def add(self, folder: str, videos: Iterable[str], beside: Iterable[str]) -> None:
        """Take in the videos of a folder, with those of its other files that bear their names.

        Args:
            folder: Relative to the root; "." for itself.
            videos: Names.
            beside: Names of its files; videos among them are not looked at.
        """
        prefix = "" if folder == "." else f"{folder}/"
        for name in videos:
            stem, _, suffix = name.rpartition(".")
            self._take(prefix + stem, suffix)
        for name in beside:
            companion = self._companion(prefix, name)
            if companion is not None:
                self._take(*companion)
            elif name[1:].lower().endswith(".txt"):
                self._alone.append(prefix + name)

    def _take(self, key: str, suffix: str) -> None:
        known = self._suffixes.get(key)
        if isinstance(known, list):
            known.append(suffix)
        elif known is not None and len(known) > _MOST_JOINED:
            self._suffixes[key] = [known, suffix]
        else:
            # A million clips have few sets of suffixes, which are interned.
            self._suffixes[key] = sys.intern(f"{known}/{suffix}" if known else suffix)

    def _companion(self, prefix: str, name: str) -> tuple[str, str] | None:
        """The key of the clip that a file belongs to, and the rest of the file's name."""
        # Of lion.last.mask.png both `lion` and `lion.last` are tried, the shorter one first.
        start = 0
        while found := _COMPANION.fullmatch(name, start):
            stem = name[: start + len(found["stem"])]
            if prefix + stem in self._suffixes:
                return prefix + stem, found["suffix"]
            start += len(found["stem"]) + 1
        return None

    def under(self, root: Path) -> VideoFiles:
        """All of them, in order."""
        keys = tuple(sorted(self._suffixes))
        found = map(self._suffixes.__getitem__, keys)
        suffixes = tuple(one if isinstance(one, str) else "/".join(one) for one in found)
        return VideoFiles(root, keys, suffixes, tuple(sorted(self._alone)))


def _read(files: Mapping[str, Path], suffix: str, limit: int) -> bytes:
    path = files[suffix]
    return read_at_most(path, limit, path.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
