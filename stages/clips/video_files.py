"""Videos with their captions and masks beside them: `lion.mp4`, `lion.txt`, `lion.mask.png`."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stages.clips.clip_members import record_of_members
from stages.clips.keys import KeyBook, has_video_suffix, videos_among
from stages.clips.limits import read_at_most
from stages.clips.records import BadRecord, ClipRecord

_COMPANION = re.compile(
    r"(?P<stem>.+?)\.(?P<suffix>txt|json|(?:last\.)?mask(?:\.[0-9]+)?\.png)", re.IGNORECASE
)


@dataclass(slots=True)
class VideoWithFiles:
    """A video's files: itself, caption, JSON, masks."""

    key: str
    files: dict[str, Path] = field(default_factory=dict)
    """By suffix, lower case."""
    problem: str | None = None

    def add(self, suffix: str, path: Path) -> None:
        """Take in a file; a second one under its suffix (`lion.txt`, `lion.TXT`) is a problem."""
        known = self.files.setdefault(suffix.lower(), path)
        if known is not path:
            self.problem = f"both {known.name} and {path.name} are there"

    @property
    def video_name(self) -> str:
        """Of its first file that is a video, relative to the root."""
        video = self.files[videos_among(self.files)[0]]
        return (Path(self.key).parent / video.name).as_posix()

    @property
    def has_caption(self) -> bool:
        """Whether a file beside it may hold a caption."""
        return "txt" in self.files or "json" in self.files


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """Clips in the order of their keys: file names relative to the root, without video suffix."""

    clips: tuple[VideoWithFiles, ...]
    captions_alone: tuple[str, ...]
    """Names of .txt files that lie beside no video of their name."""

    @classmethod
    def in_folder(cls, root: Path) -> "VideoFiles":
        """All videos in a folder and those below it; hidden files and folders are left out.

        Links to folders are followed; a folder that several lead to is looked through once.
        """
        found: list[Path] = []
        seen: set[str] = set()
        for folder, below, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not _is_hidden(name))
            found += [Path(folder, name) for name in sorted(names) if not _is_hidden(name)]
        return cls.of(root, (path for path in found if has_video_suffix(path.name)), found)

    @classmethod
    def of_videos(cls, root: Path, videos: Iterable[Path]) -> "VideoFiles":
        """These videos, and what lies beside them."""
        videos = list(videos)
        folders = {video.parent for video in videos}
        beside = [path for folder in folders for path in sorted(folder.iterdir())]
        return cls.of(root, videos, beside)

    @classmethod
    def of(cls, root: Path, videos: Iterable[Path], beside: Iterable[Path]) -> "VideoFiles":
        """These videos, with those of the other files that bear their names.

        Args:
            root: Keys are relative to it.
            videos: In any order.
            beside: Other files; videos among them are not looked at.
        """
        clips: dict[Path, VideoWithFiles] = {}
        for video in videos:
            stem = video.with_name(video.name.rpartition(".")[0])
            clip = clips.setdefault(stem, VideoWithFiles(stem.relative_to(root).as_posix()))
            clip.add(video.suffix[1:], video)
        alone = []
        for path in beside:
            companion = _companion(path, clips)
            if companion is not None:
                stem, suffix = companion
                clips[stem].add(suffix, path)
            elif path.suffix.lower() == ".txt":
                alone.append(path.relative_to(root).as_posix())
        in_order = sorted(clips.values(), key=lambda clip: clip.key)
        return cls(tuple(in_order), tuple(sorted(alone)))

    @property
    def name(self) -> str:
        """What its parts are called."""
        return "videos"

    @property
    def num_with_caption(self) -> int:
        """Clips beside which a .txt or a .json lies."""
        return sum(clip.has_caption for clip in self.clips)

    def __len__(self) -> int:
        return len(self.clips)

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]:
        """The clips from `start` up to `stop`, with their captions and masks read."""
        book = KeyBook()
        for clip in self.clips[start:stop]:
            if refusal := book.claim(clip.key):
                yield BadRecord(key=book.stand_in(clip.key), reason="bad_record", detail=refusal)
            elif clip.problem:
                yield BadRecord(key=clip.key, reason="bad_record", detail=clip.problem)
            else:
                read, video = partial(_read, clip), clip.files.__getitem__
                yield record_of_members(clip.key, clip.files, read=read, video=video)

    def num_bytes(self, start: int, stop: int) -> int:
        """Size of the videos of the clips from `start` up to `stop`."""
        return sum(
            path.stat().st_size
            for clip in self.clips[start:stop]
            for path in clip.files.values()
            if has_video_suffix(path.name) and path.is_file()
        )


def _companion(path: Path, clips: dict[Path, VideoWithFiles]) -> tuple[Path, str] | None:
    """The video's name without its suffix, and the rest of the file's name."""
    # Of lion.last.mask.png both `lion` and `lion.last` are tried, the shorter one first.
    start = 0
    while found := _COMPANION.fullmatch(path.name, start):
        stem = path.with_name(path.name[: start + len(found["stem"])])
        if stem in clips:
            return stem, found["suffix"]
        start += len(found["stem"]) + 1
    return None


def _read(clip: VideoWithFiles, suffix: str, limit: int) -> bytes:
    path = clip.files[suffix]
    return read_at_most(path, limit, path.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
