"""Hints for paths that are not a dataset: what they contain, and commands to convert it."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stages.clips.keys import UNSUPPORTED_SUFFIXES, has_video_suffix

_UNPACK_COMMANDS = {
    (".tar.gz", ".tgz"): "gunzip --keep",
    (".tar.bz2", ".tbz2"): "bunzip2 --keep",
    (".tar.xz", ".txz"): "unxz --keep",
    (".tar.zst",): "unzstd",
    (".zip",): "unzip",
}
_PICTURES = (".jpg", ".jpeg", ".png")
_MAX_FILES = 20_000
"""Maximum number of files examined."""


def describe_contents(path: Path) -> str:
    """Describe a file or folder and how to convert it to a dataset; starts with ": "."""
    if hints := conversion_hint(path):
        return f": {hints}"
    if path.is_file():
        return ""
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    counted = Counter(Path(name).suffix or "files without suffix" for name in names)
    shown = ", ".join(f"{count} {suffix}" for suffix, count in counted.most_common(5))
    return f": it contains {shown}" if shown else ": it is empty"


def conversion_hint(path: Path) -> str:
    """Commands that convert the content of a file or folder to a dataset; "" if none apply."""
    if path.is_file():
        return ". ".join(_hints_for_files(path.parent, [path.name]))
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    return ". ".join(_hints_for_files(path, names) + _hints_for_folders(path, names))


def _hints_for_files(folder: Path, names: Sequence[str]) -> list[str]:
    hints = []
    for suffixes, command in _UNPACK_COMMANDS.items():
        packed = [name for name in names if name.lower().endswith(suffixes)]
        if packed:
            files = _quoted(folder, packed)
            hints.append(
                f"{_counted(packed)} compressed; only uncompressed tars are read: {command} {files}"
            )
    tables = [name for name in names if name.lower().endswith(".parquet")]
    if tables:
        script = (
            "import pandas, sys; pandas.concat(map(pandas.read_parquet, sys.argv[2:]))"
            ".to_json(sys.argv[1], orient='records', lines=True)"
        )
        output = shlex.quote(str(folder / "metadata.jsonl"))
        hints.append(
            f"{_counted(tables)} parquet, which is not supported. If it has the columns file_name "
            f'and caption: python -c "{script}" {output} {_quoted(folder, tables)}'
        )
    unsupported = [
        name for name in names if name.lower().rpartition(".")[2] in UNSUPPORTED_SUFFIXES
    ]
    if unsupported:
        hints.append(f"{_counted(unsupported)} in an unsupported format: convert to mp4")
    lists = [name for name in names if name.lower().endswith((".jsonl", ".csv", ".json"))]
    if lists and len(names) > 1:
        hints.append(
            f"{_counted(lists)} perhaps a list of clips; if so, set data.path={folder / lists[0]}"
        )
    return hints


def _hints_for_folders(folder: Path, names: Sequence[str]) -> list[str]:
    hints = []
    if {"videos", "labels"} <= set(names):
        videos, labels = folder / "videos", folder / "labels"
        hints.append(
            f"captions are in {labels}, videos in {videos}; put them side by side: "
            f"cp {shlex.quote(str(labels))}/*.txt {shlex.quote(str(videos))}/ and set "
            f"data.path={videos}"
        )
    frames = _first_folder_of_frames(folder)
    if frames is not None:
        hints.append(
            f"{frames[0]} contains a video as {frames[1]} files; encode it at its original frame "
            f"rate: {_encode(*frames, is_single=frames[0] == folder)}"
        )
    inside = [name for name in names if _holds_dataset(folder / name)]
    if inside:
        shown = ", ".join(f"data.path={folder / name}" for name in inside[:3])
        hints.append(f"subfolders contain datasets: {shown}")
    return hints


def _holds_dataset(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    return any(
        name.endswith(".tar") or name in ("metadata.jsonl", "metadata.csv", "videos.txt")
        for name in names
    )


def _first_folder_of_frames(folder: Path) -> tuple[Path, str] | None:
    """The first folder below this one with pictures but no video, and the pictures' suffix."""
    num_files = 0
    for below, folders, names in os.walk(folder):
        folders.sort()
        num_files += len(names)
        if num_files > _MAX_FILES:
            return None
        counted = Counter(Path(name).suffix for name in names if not name.startswith("."))
        pictures = [suffix for suffix in counted if suffix.lower() in _PICTURES]
        is_frames = any(counted[suffix] > 1 for suffix in pictures)
        if is_frames and not any(map(has_video_suffix, names)):
            return Path(below), max(pictures, key=lambda suffix: counted[suffix])
    return None


def _encode(frames: Path, suffix: str, *, is_single: bool) -> str:
    """Command that encodes a folder of pictures as a video, or every folder beside it."""
    options = "-c:v libx264 -crf 10 -pix_fmt yuv444p"
    if is_single:
        folder, video = shlex.quote(str(frames)), shlex.quote(f"{frames}.mp4")
        return f"ffmpeg -framerate 24 -pattern_type glob -i {folder}/'*{suffix}' {options} {video}"
    return (
        f"for d in {shlex.quote(str(frames.parent))}/*/; do ffmpeg -framerate 24 -pattern_type "
        f'glob -i "$d*{suffix}" {options} "${{d%/}}.mp4"; done'
    )


def _counted(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _quoted(folder: Path, names: Sequence[str]) -> str:
    """Shell arguments for the files: the name of a single one, otherwise patterns by suffix."""
    if len(names) == 1:
        return shlex.quote(str(folder / names[0]))
    ends = sorted({name[name.index(".") :] for name in names})
    return " ".join(f"{shlex.quote(str(folder))}/*{end}" for end in ends)
