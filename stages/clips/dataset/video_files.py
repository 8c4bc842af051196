"""Datasets of videos with caption and mask files: `lion.mp4`, `lion.txt`, `lion.mask.png`."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from stages.clips.dataset.fields import read_at_most, record_of_members
from stages.clips.dataset.keys import KeyRegistry, has_video_suffix, videos_among
from stages.clips.records import BadRecord, ClipRecord

_COMPANION = re.compile(
    r"(?P<stem>.+?)\.(?P<suffix>txt|json|(?:last\.)?mask(?:\.[0-9]+)?\.png)", re.IGNORECASE
)

_MAX_JOINED_CHARS = 256
"""Up to this length, suffixes of a clip are joined in one interned string; beyond, in a list."""


@dataclass(frozen=True, slots=True)
class VideoWithFiles:
    """The files of a clip: video, caption, JSON, masks."""

    key: str
    suffixes: tuple[str, ...]
    """Suffixes of its files, without the dot after the key."""

    @property
    def files(self) -> dict[str, str]:
        """File names relative to the root, by lower-case suffix; the first of duplicates."""
        files: dict[str, str] = {}
        for suffix in self.suffixes:
            files.setdefault(suffix.lower(), f"{self.key}.{suffix}")
        return files

    @property
    def problem(self) -> str | None:
        """Error message for two files with the same suffix (`lion.txt`, `lion.TXT`), or None."""
        files = self.files
        for suffix in self.suffixes:
            known, name = files[suffix.lower()], f"{self.key}.{suffix}"
            if known != name:
                return f"both {PurePosixPath(known).name} and {PurePosixPath(name).name} exist"
        return None

    @property
    def video_name(self) -> str:
        """Name of its first video file, relative to the root."""
        files = self.files
        return files[videos_among(files)[0]]


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """Clips sorted by key: the file name relative to the root, without video suffix.

    To save memory, each clip is stored as its key and a string of its suffixes, which most clips
    share.
    """

    root: Path
    keys: tuple[str, ...]
    suffixes: tuple[str, ...]
    """Suffixes of each clip's files, separated by slashes."""
    unmatched_captions: tuple[str, ...]
    """Names of .txt files without a video of the same name."""

    @classmethod
    def in_folder(cls, root: Path) -> "VideoFiles":
        """Find all videos in a folder and below, ignoring hidden files and folders.

        Links to folders are followed, but each folder is visited only once.
        """
        scan = _FolderScan()
        visited: set[str] = set()
        for folder, below, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:
                below.clear()
                continue
            visited.add(real)
            below[:] = sorted(name for name in below if not _is_hidden(name))
            shown = sorted(name for name in names if not _is_hidden(name))
            scan.add(os.path.relpath(folder, root), filter(has_video_suffix, shown), shown)
        return scan.build(root)

    @classmethod
    def of_videos(cls, root: Path, videos: Iterable[Path]) -> "VideoFiles":
        """Use these videos, and the caption and mask files beside them."""
        by_folder: dict[Path, list[str]] = {}
        for video in videos:
            by_folder.setdefault(video.parent, []).append(video.name)
        scan = _FolderScan()
        for folder, names in by_folder.items():
            scan.add(os.path.relpath(folder, root), names, sorted(p.name for p in folder.iterdir()))
        return scan.build(root)

    @property
    def name(self) -> str:
        """Name of the list in shard sources."""
        return "videos"

    @property
    def num_with_caption(self) -> int:
        """Number of clips with a .txt or .json file."""
        return sum(
            count
            for suffixes, count in Counter(self.suffixes).items()
            if {"txt", "json"} & set(suffixes.lower().split("/"))
        )

    def __len__(self) -> int:
        return len(self.keys)

    def clip(self, row: int) -> VideoWithFiles:
        """The files of the clip at an index."""
        return VideoWithFiles(self.keys[row], tuple(self.suffixes[row].split("/")))

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """Read the records from `start` up to `stop`, including their captions and masks."""
        registry = KeyRegistry()
        for clip in map(self.clip, range(start, stop)):
            files = {suffix: self.root / name for suffix, name in clip.files.items()}
            read, video = partial(_read, files), files.__getitem__
            yield registry.reject(clip.key, clip.problem) or record_of_members(
                clip.key, files, read=read, video=video
            )

    def num_bytes(self, start: int, stop: int) -> int:
        """Total size of the videos from `start` up to `stop`."""
        return sum(
            path.stat().st_size
            for clip in map(self.clip, range(start, stop))
            for name in clip.files.values()
            if has_video_suffix(name) and (path := self.root / name).is_file()
        )


class _FolderScan:
    """Collects clips while folders are scanned."""

    def __init__(self) -> None:
        self._suffixes: dict[str, str | list[str]] = {}
        """Suffixes by key, separated by slashes; a list if there are many."""
        self._unmatched: list[str] = []

    def add(self, folder: str, videos: Iterable[str], names_in_folder: Iterable[str]) -> None:
        """Add the videos of a folder and their caption and mask files.

        Args:
            folder: Path relative to the root; "." for the root.
            videos: File names of the videos.
            names_in_folder: Names of all files in the folder; videos among them are ignored.
        """
        prefix = "" if folder == "." else f"{folder}/"
        for name in videos:
            stem, _, suffix = name.rpartition(".")
            self._add_suffix(prefix + stem, suffix)
        for name in names_in_folder:
            companion = self._match_companion(prefix, name)
            if companion is not None:
                self._add_suffix(*companion)
            elif name[1:].lower().endswith(".txt"):
                self._unmatched.append(prefix + name)

    def _add_suffix(self, key: str, suffix: str) -> None:
        known = self._suffixes.get(key)
        if isinstance(known, list):
            known.append(suffix)
        elif known is not None and len(known) > _MAX_JOINED_CHARS:
            self._suffixes[key] = [known, suffix]
        else:
            # Even a million clips have few distinct sets of suffixes, which are interned.
            self._suffixes[key] = sys.intern(f"{known}/{suffix}" if known else suffix)

    def _match_companion(self, prefix: str, name: str) -> tuple[str, str] | None:
        """The key of the clip that a file belongs to, and its suffix."""
        # For lion.last.mask.png both `lion` and `lion.last` are tried, the shorter one first.
        start = 0
        while match := _COMPANION.fullmatch(name, start):
            stem = name[: start + len(match["stem"])]
            if prefix + stem in self._suffixes:
                return prefix + stem, match["suffix"]
            start += len(match["stem"]) + 1
        return None

    def build(self, root: Path) -> VideoFiles:
        """All clips, sorted by key."""
        keys = tuple(sorted(self._suffixes))
        joined = map(self._suffixes.__getitem__, keys)
        suffixes = tuple(one if isinstance(one, str) else "/".join(one) for one in joined)
        return VideoFiles(root, keys, suffixes, tuple(sorted(self._unmatched)))


def _read(files: Mapping[str, Path], suffix: str, limit: int) -> bytes:
    path = files[suffix]
    return read_at_most(path, limit, path.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
