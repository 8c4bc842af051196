"""The clips that a run began with, kept in its folder: it may go on with fewer, not with others.

    <run_dir>/
        clips/9x32x48.txt      the keys of the clips of a size that are trained on, one a line
        new_clips.jsonl        clips that the cache has gained, for train.leave_out

A clip is on one side of the held-out split for the whole of a run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache_schema import SortedText
from cache_schema.atomic_io import make_directories, write_whole

_FOLDER = "clips"
_NEW_CLIPS_FILE = "new_clips.jsonl"
_NAMED = 3
"""Keys that a message names."""


def digest(keys: SortedText) -> str:
    """Of keys, 12 hexadecimal digits."""
    found = hashlib.sha256(keys.blob.data)
    found.update(keys.ends.astype("<u8", copy=False).data)
    return found.hexdigest()[:12]


def write_clips(run_dir: Path, clips: Mapping[str, SortedText]) -> None:
    """Write down the clips of each size."""
    make_directories(run_dir / _FOLDER)
    for size, keys in clips.items():
        data = b"".join(b"%s\n" % key for piece in keys.pieces() for key in piece)
        path = _path(run_dir, size)
        write_whole(path, data, temporary=path.with_name(f".{path.name}.partial"))


def compare_clips(
    run_dir: Path,
    digests: Mapping[str, str],
    clips: Mapping[str, SortedText],
    *,
    held_out_before: Sequence[str],
    held_out: Sequence[str],
    leave_out: Path | None,
) -> str | None:
    """What to tell of a run that goes on with fewer clips than it began with; None if it does not.

    Args:
        digests: `digest` of the keys that the run began with, by size.
        clips: those there are to train on now, of the same sizes.
        held_out_before: clips held out when the run began.
        held_out: clips held out now.
        leave_out: the manifest of clips that are left out now.

    Raises:
        ValueError: there are clips that the run did not begin with, or that were on the other side
            of the held-out split; or the list of those it began with is damaged.
    """
    gone: list[str] = []
    new: list[str] = []
    total = 0
    for size, keys in clips.items():
        if digests.get(size) == digest(keys):
            total += len(keys)
            continue
        before = _read_clips(run_dir, size, digests.get(size))
        total += len(before)
        gone += before.take(np.flatnonzero(keys.rows_of(before) < 0))
        new += keys.take(np.flatnonzero(before.rows_of(keys) < 0))
    swapped = sorted({*gone} & {*held_out} | {*new} & {*held_out_before})
    if swapped:
        raise ValueError(
            f"{run_dir} holds a run that began with train.validation.clips="
            f"{len(held_out_before)}; another number would train on clips that were held out, or "
            f"hold out clips that were trained on: {_named(swapped)}. Set it to that number, or "
            "choose another train.run_dir"
        )
    if new:
        manifest = _list_new(run_dir, new, leave_out)
        raise ValueError(
            f"{run_dir} holds a run on {total} clips, and there are {len(new)} to train on now "
            f"that are not among them: {_named(new)}. To go on without those, set "
            f"train.leave_out={manifest}, which lists them; to train on them, choose another "
            "train.run_dir"
        )
    if not gone:
        return None
    return (
        f"{len(gone)} of the {total} clips that the run began with are not there any more, or "
        f"left out: {_named(gone)}. It goes on with the {total - len(gone)} others, whose order is "
        "drawn anew from the seed: in the epoch that has begun, some can come twice and others not"
    )


def _path(run_dir: Path, size: str) -> Path:
    return run_dir / _FOLDER / f"{size}.txt"


def _read_clips(run_dir: Path, size: str, wanted: str | None) -> SortedText:
    path = _path(run_dir, size)
    try:
        keys = SortedText.from_utf8(path.read_bytes().split(b"\n")[:-1])
        what = None if digest(keys) == wanted else "is not what the run wrote"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    if what is not None:
        raise ValueError(
            f"the clips are not those that the run in {run_dir} began with, and {path}, which "
            f"lists them, {what}; restore it, or choose another train.run_dir"
        )
    return keys


def _list_new(run_dir: Path, new: Sequence[str], leave_out: Path | None) -> Path:
    """A manifest of the new clips and of those that are left out already."""
    path = run_dir / _NEW_CLIPS_FILE
    text = "" if leave_out is None else leave_out.expanduser().read_text(encoding="utf-8")
    listed = (line for line in text.split("\n") if line)  # splitlines would split in a key, too
    lines = [*listed, *(json.dumps({"key": key}) for key in dict.fromkeys(new))]
    data = "".join(f"{line}\n" for line in lines).encode()
    write_whole(path, data, temporary=path.with_name(f".{path.name}.partial"))
    return path


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(map(repr, keys[:_NAMED])) + more
