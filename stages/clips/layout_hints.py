"""What lies where a dataset was expected, and the command that makes one of it."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stages.clips.keys import UNREAD_SUFFIXES, has_video_suffix

_UNPACK = {
    (".tar.gz", ".tgz"): "gunzip --keep",
    (".tar.bz2", ".tbz2"): "bunzip2 --keep",
    (".tar.xz", ".txz"): "unxz --keep",
    (".tar.zst",): "unzstd",
    (".zip",): "unzip",
}
_PICTURES = (".jpg", ".jpeg", ".png")
_MAX_FILES = 20_000
"""Files that are looked at, at most."""


def what_else_is_there(path: Path) -> str:
    """What a file or a folder holds that could be made a dataset, and how; begins with ": "."""
    if found := how_to_convert(path):
        return f": {found}"
    if path.is_file():
        return ""
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    counted = Counter(Path(name).suffix or "files without suffix" for name in names)
    shown = ", ".join(f"{count} {suffix}" for suffix, count in counted.most_common(5))
    return f": it holds {shown}" if shown else ": it is empty"


def how_to_convert(path: Path) -> str:
    """What a file or a folder holds that could be made a dataset, and the commands; or ""."""
    if path.is_file():
        return ". ".join(_of_names(path.parent, [path.name]))
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    return ". ".join(_of_names(path, names) + _of_folders(path, names))


def _of_names(folder: Path, names: Sequence[str]) -> list[str]:
    found = []
    for suffixes, command in _UNPACK.items():
        packed = [name for name in names if name.lower().endswith(suffixes)]
        if packed:
            files = _quoted(folder, packed)
            found.append(
                f"{_counted(packed)} compressed, and tars are read as they are: {command} {files}"
            )
    tables = [name for name in names if name.lower().endswith(".parquet")]
    if tables:
        script = (
            "import pandas, sys; pandas.concat(map(pandas.read_parquet, sys.argv[2:]))"
            ".to_json(sys.argv[1], orient='records', lines=True)"
        )
        anew = shlex.quote(str(folder / "metadata.jsonl"))
        found.append(
            f"{_counted(tables)} parquet, which is not read. If it has the columns file_name and "
            f'caption: python -c "{script}" {anew} {_quoted(folder, tables)}'
        )
    unread = [name for name in names if name.lower().rpartition(".")[2] in UNREAD_SUFFIXES]
    if unread:
        found.append(f"{_counted(unread)} of a kind that is not decoded: convert to mp4")
    lists = [name for name in names if name.lower().endswith((".jsonl", ".csv", ".json"))]
    if lists and len(names) > 1:
        found.append(
            f"{_counted(lists)} perhaps a list of clips; then name it: "
            f"data.path={folder / lists[0]}"
        )
    return found


def _of_folders(folder: Path, names: Sequence[str]) -> list[str]:
    found = []
    if {"videos", "labels"} <= set(names):
        videos, labels = folder / "videos", folder / "labels"
        found.append(
            f"captions lie in {labels}, videos in {videos}; put them side by side: "
            f"cp {shlex.quote(str(labels))}/*.txt {shlex.quote(str(videos))}/ and set "
            f"data.path={videos}"
        )
    frames = _first_folder_of_frames(folder)
    if frames is not None:
        found.append(
            f"{frames[0]} holds a video as {frames[1]} files; make a video file of it, at the rate "
            f"it was filmed at: {_encode(*frames, alone=frames[0] == folder)}"
        )
    inside = [name for name in names if _holds_dataset(folder / name)]
    if inside:
        shown = ", ".join(f"data.path={folder / name}" for name in inside[:3])
        found.append(f"there are datasets in folders of it: {shown}")
    return found


def _holds_dataset(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    return any(
        name.endswith(".tar") or name in ("metadata.jsonl", "metadata.csv", "videos.txt")
        for name in names
    )


def _first_folder_of_frames(folder: Path) -> tuple[Path, str] | None:
    """The first folder below this one that holds pictures and no video, and their suffix."""
    seen = 0
    for below, folders, names in os.walk(folder):
        folders.sort()
        seen += len(names)
        if seen > _MAX_FILES:
            return None
        counted = Counter(Path(name).suffix for name in names if not name.startswith("."))
        pictures = [suffix for suffix in counted if suffix.lower() in _PICTURES]
        is_frames = any(counted[suffix] > 1 for suffix in pictures)
        if is_frames and not any(map(has_video_suffix, names)):
            return Path(below), max(pictures, key=lambda suffix: counted[suffix])
    return None


def _encode(frames: Path, suffix: str, *, alone: bool) -> str:
    """The command that makes a video of a folder of pictures, or of each folder beside it."""
    options = "-c:v libx264 -crf 10 -pix_fmt yuv444p"
    if alone:
        folder, video = shlex.quote(str(frames)), shlex.quote(f"{frames}.mp4")
        return f"ffmpeg -framerate 24 -pattern_type glob -i {folder}/'*{suffix}' {options} {video}"
    return (
        f"for d in {shlex.quote(str(frames.parent))}/*/; do ffmpeg -framerate 24 -pattern_type "
        f'glob -i "$d*{suffix}" {options} "${{d%/}}.mp4"; done'
    )


def _counted(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _quoted(folder: Path, names: Sequence[str]) -> str:
    """The files for a shell: one by its name, several by what their names end in."""
    if len(names) == 1:
        return shlex.quote(str(folder / names[0]))
    ends = sorted({name[name.index(".") :] for name in names})
    return " ".join(f"{shlex.quote(str(folder))}/*{end}" for end in ends)
