"""Recognises the layout of the video dataset at a path; hints at conversions if there is none."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache_schema.shown_text import first_few
from stages.clips.dataset.keys import UNSUPPORTED_SUFFIXES, has_video_suffix
from stages.clips.dataset.rows import CAPTION_LISTS, VIDEO_LISTS

_METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_MAX_ALTERNATIVES = 100_000

_UNPACK_COMMANDS = {
    (".tar.gz", ".tgz"): "gunzip --keep",
    (".tar.bz2", ".tbz2"): "bunzip2 --keep",
    (".tar.xz", ".txz"): "unxz --keep",
    (".tar.zst",): "unzstd",
    (".zip",): "unzip",
}
_PICTURES = (".jpg", ".jpeg", ".png")
_MAX_FILES = 20_000
"""Maximum number of files examined for a hint."""

LAYOUTS = (
    "a folder of webdataset tars (00000.tar with key.mp4 and key.txt or key.json in it), one tar, "
    "or a pattern of tars; a folder with metadata.jsonl or metadata.csv (file_name, caption); with "
    "prompts.txt and videos.txt; or with videos and their captions beside them (lion.mp4, lion.txt)"
)
"""The supported layouts, for error messages."""

LayoutKind = Literal["tars", "metadata", "line lists", "videos"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Layout and files of a dataset; no file is read."""

    kind: LayoutKind
    root: Path
    """The folder that file names are relative to."""
    files: tuple[Path, ...]
    """The tars; the metadata file; the list of captions and the list of videos; or the videos. ()
    stands for all videos in the root and below."""
    named: str
    """An unambiguous data.path for this dataset."""

    @property
    def description(self) -> str:
        """Short description, for messages."""
        names = " and ".join(path.name for path in self.files[:2])
        if self.kind == "tars":
            return f"{len(self.files)} tar{'s' if self.files[1:] else ''}"
        return "videos with captions beside them" if self.kind == "videos" else names


def find_layout(path: Path) -> Layout:
    """Recognise the layout of the dataset at `data.path`; opens no file.

    Args:
        path: A folder, a file (tar, metadata file, list of videos, video), or a pattern of tars or
            of videos (`{00000..00003}.tar`, `*.tar`, `lion-?.mp4`).

    Raises:
        ValueError: There is no dataset, or more than one. The message says what is there and how
            to convert it, or lists the path of each dataset.
    """
    path = path.expanduser()
    if path.is_file():
        return _layout_of_file(path)
    if path.is_dir():
        return _layout_of_folder(path)
    if re.search(r"[*?\[{]", str(path)):
        return _layout_of_pattern(path)
    raise ValueError(f"data.path {path} does not exist; expected {LAYOUTS}")


def _layout_of_file(path: Path) -> Layout:
    folder = path.parent
    if path.suffix.lower() == ".tar":
        return Layout(kind="tars", root=folder, files=(path,), named=str(path))
    if path.suffix.lower() in (".jsonl", ".csv", ".json"):
        return Layout(kind="metadata", root=folder, files=(path,), named=str(path))
    if has_video_suffix(path.name):
        return Layout(kind="videos", root=folder, files=(path,), named=str(path))
    if path.name in VIDEO_LISTS:
        return _line_lists(folder, [path.name])
    raise ValueError(
        f"data.path {path} is not a dataset{describe_contents(path)}. Expected {LAYOUTS}"
    )


def _layout_of_folder(folder: Path) -> Layout:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    found: list[Layout] = []
    tars = tuple(folder / name for name in names if name.endswith(".tar"))
    tars = tuple(tar for tar in tars if tar.is_file())
    if tars:
        found.append(Layout(kind="tars", root=folder, files=tars, named=str(folder / "*.tar")))
    for name in _METADATA_NAMES:
        if name in names:
            file = folder / name
            found.append(Layout(kind="metadata", root=folder, files=(file,), named=str(file)))
    videos = [name for name in names if has_video_suffix(name)]
    stems = {name.rpartition(".")[0] for name in videos}
    # A video.txt beside a video.mp4 is its caption, not a list.
    lists = [name for name in VIDEO_LISTS if name in names and name[: -len(".txt")] not in stems]
    if lists:
        found.append(_line_lists(folder, lists))
    captions = (name for name in names if name.endswith((".txt", ".json")))
    if not found or any(name.rpartition(".")[0] in stems for name in captions):
        # If another layout was found, only videos with captions in this very folder count: those
        # below usually belong to that layout.
        named = str(folder / f"*.{videos[0].rpartition('.')[2]}") if videos else str(folder)
        found.append(Layout(kind="videos", root=folder, files=(), named=named))
    if len(found) > 1:
        choices = "; ".join(f"{one.description}: data.path={one.named!r}" for one in found)
        raise ValueError(
            f"data.path {folder} contains several datasets. Choose one of them: {choices}"
        )
    return found[0]


def _line_lists(folder: Path, video_lists: Sequence[str]) -> Layout:
    captions = [name for name in CAPTION_LISTS if (folder / name).is_file()]
    if len(captions) != 1 or len(video_lists) != 1:
        found = ", ".join([*captions, *video_lists])
        raise ValueError(
            f"{folder / video_lists[0]} lists videos; expected one such list and, line by line, "
            f"captions in one of {', '.join(CAPTION_LISTS)}; found {found}"
        )
    files = (folder / captions[0], folder / video_lists[0])
    return Layout(kind="line lists", root=folder, files=files, named=str(files[1]))


def _layout_of_pattern(pattern: Path) -> Layout:
    files: list[Path] = []
    missing: list[str] = []
    for alternative in _expand_braces(str(pattern)):
        if re.search(r"[*?\[]", alternative):
            folder = _fixed_folder(Path(alternative))
            found = sorted(folder.glob(str(Path(alternative).relative_to(folder))))
            files += [path for path in found if path.is_file() and path.name[0] != "."]
        elif Path(alternative).is_file():
            files.append(Path(alternative))
        else:
            missing.append(alternative)
    if missing:
        raise ValueError(
            f"data.path {pattern}: {len(missing)} of its files are missing: {first_few(missing, 5)}"
        )
    if not files:
        raise ValueError(f"data.path {pattern} matches no file")
    files = list(dict.fromkeys(files))
    root = _fixed_folder(pattern)
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    known = tars + [file for file in files if has_video_suffix(file.name)]
    if len(known) == len(files) and len(tars) in (0, len(files)):
        kind: LayoutKind = "tars" if tars else "videos"
        return Layout(kind=kind, root=root, files=tuple(files), named=str(pattern))
    others = [file.name for file in files if file not in known] or [file.name for file in files]
    raise ValueError(
        f"data.path {pattern} must match only tars or only videos; it matches {len(files)} files, "
        f"among them {', '.join(others[:3])}"
    )


def _fixed_folder(pattern: Path) -> Path:
    """The deepest folder that contains every file of a pattern."""
    fixed = []
    for part in pattern.parent.parts:
        if re.search(r"[*?\[{]", part):
            break
        fixed.append(part)
    return Path(*fixed)


def _expand_braces(pattern: str) -> list[str]:
    """Expand braces like a shell: `{a,b}` and `{00000..00003}`, keeping leading zeros.

    Raises:
        ValueError: There are more than _MAX_ALTERNATIVES.
    """
    expanded, pending = [], [pattern]
    while pending:
        text = pending.pop()
        found = re.search(r"\{([^{}]*)\}", text)
        options = _expand_group(found[1]) if found else None
        if found is None or options is None:
            expanded.append(text)
            continue
        if len(pending) + len(expanded) + len(options) > _MAX_ALTERNATIVES:
            raise ValueError(f"data.path {pattern} expands to over {_MAX_ALTERNATIVES:,} files")
        before, after = text[: found.start()], text[found.end() :]
        pending += [before + one + after for one in reversed(options)]
    return expanded


def _expand_group(group: str) -> list[str] | None:
    numbers = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", group)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last - first >= _MAX_ALTERNATIVES:
            raise ValueError(f"{{{group}}} expands to over {_MAX_ALTERNATIVES:,} files")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        width = max(width, len(numbers[2])) if width else 0
        return [str(number).zfill(width) for number in range(first, last + 1)]
    return group.split(",") if "," in group else None


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
    return any(name.endswith(".tar") or name in (*_METADATA_NAMES, "videos.txt") for name in names)


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
