"""Folders of generated videos, and their pairing by prompt and seed."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stages.clips.dataset.keys import videos_among
from stages.clips.dataset.video_files import VideoFiles, VideoWithFiles
from stages.files.text import read_object

VBENCH_NAME = re.compile(r"(?P<prompt>.+)-(?P<number>[0-9]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One generated video."""

    key: str
    """File name relative to the folder, without suffix."""
    path: Path
    prompt: str | None
    """From the JSON file that sampling writes beside it, or from a name `{prompt}-{n}` as VBench
    uses; None if neither exists."""
    number: int | None
    """The seed, or n."""

    @property
    def pair(self) -> tuple[str, int | None]:
        """What it shares with its partner on another side: prompt and seed, otherwise its key."""
        return (self.key, None) if self.prompt is None else (self.prompt, self.number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """The videos of one model."""

    name: str
    folder: Path
    videos: tuple[Video, ...]


def open_side(name: str, folder: Path) -> Side:
    """List the videos of a folder and below.

    Raises:
        ValueError: There is no such folder, it holds no videos, two of them have the same name but
            for the suffix, or the same prompt and seed, so that they could not be paired.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name a folder of videos")
    files = VideoFiles.in_folder(folder)
    if len(files) == 0:
        raise ValueError(f"{folder} holds no videos")
    videos = tuple(_video(folder, files.clip(row)) for row in range(len(files)))
    pair, count = Counter(video.pair for video in videos).most_common(1)[0]
    if count > 1:
        same = [video.key for video in videos if video.pair == pair]
        raise ValueError(
            f"{folder} holds {count} videos of prompt {pair[0]!r:.80} and seed {pair[1]}: "
            f"{same[0]} and {same[1]}; keep one of them, or name them {{prompt}}-{{n}}.mp4"
        )
    return Side(name=name, folder=folder, videos=videos)


def _video(folder: Path, files: VideoWithFiles) -> Video:
    problem = files.problem
    if len(of_name := videos_among(files.files)) > 1:
        problem = f"{files.key}.{of_name[0]} and {files.key}.{of_name[1]} have one name"
    if problem is not None:
        raise ValueError(f"{folder}: {problem}; remove one of them")
    key, path = files.key, folder / files.video_name
    record = path.with_suffix(".json")
    if record.is_file():
        fields = read_object(record)
        prompt, seed = fields.get("prompt"), fields.get("seed")
        if isinstance(prompt, str):
            number = seed if isinstance(seed, int) else None
            return Video(key=key, path=path, prompt=prompt, number=number)
    found = VBENCH_NAME.fullmatch(path.stem)
    if found is None:
        return Video(key=key, path=path, prompt=None, number=None)
    return Video(key=key, path=path, prompt=found["prompt"], number=int(found["number"]))


def pair_videos(first: Side, second: Side) -> tuple[list[tuple[Video, Video]], list[str]]:
    """Pair the videos of two sides.

    Returns:
        The pairs in the order of the first side, and the keys of videos without a partner.
    """
    partners = {video.pair: video for video in second.videos}
    pairs = [(video, partners.pop(video.pair)) for video in first.videos if video.pair in partners]
    paired = {video.key for video, _ in pairs}
    alone = [video.key for video in first.videos if video.key not in paired]
    return pairs, [*alone, *(video.key for video in partners.values())]
