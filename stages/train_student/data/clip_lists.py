"""Lists of the clips that a run started with: it may resume with fewer clips, but not with others.

    <run_dir>/
        clips/9x32x48.txt      keys of the training clips of a size, one per line
        new_clips.jsonl        clips added to the cache since, for train.leave_out

A clip stays on one side of the held-out split for the whole run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache_schema import SortedText
from cache_schema.atomic_io import make_directories, write_atomic

_FOLDER = "clips"
_NEW_CLIPS_FILE = "new_clips.jsonl"
_MAX_KEYS_SHOWN = 3
"""Keys listed in a message."""


def digest(keys: SortedText) -> str:
    """SHA-256 of the keys, first 12 hexadecimal digits."""
    sha256 = hashlib.sha256(keys.blob.data)
    sha256.update(keys.ends.astype("<u8", copy=False).data)
    return sha256.hexdigest()[:12]


def write_clips(run_dir: Path, clips: Mapping[str, SortedText]) -> None:
    """Write the list of training clips of each size."""
    make_directories(run_dir / _FOLDER)
    for size, keys in clips.items():
        data = b"".join(b"%s\n" % key for piece in keys.pieces() for key in piece)
        path = _path(run_dir, size)
        write_atomic(path, data, temporary=path.with_name(f".{path.name}.partial"))


def compare_clips(
    run_dir: Path,
    digests: Mapping[str, str],
    clips: Mapping[str, SortedText],
    *,
    held_out_before: Sequence[str],
    held_out: Sequence[str],
    leave_out: Path | None,
) -> str | None:
    """Compare the current training clips with those that the run started with.

    Args:
        digests: `digest` of the keys that the run started with, by size.
        clips: current training clips, of the same sizes.
        held_out_before: clips held out when the run started.
        held_out: clips held out now.
        leave_out: current manifest of excluded clips.

    Returns:
        A message if the run continues with fewer clips, otherwise None.

    Raises:
        ValueError: there are clips that the run did not start with, or that were on the other side
            of the held-out split; or the run's own list is damaged.
    """
    missing: list[str] = []
    new: list[str] = []
    total = 0
    for size, keys in clips.items():
        if digests.get(size) == digest(keys):
            total += len(keys)
            continue
        before = _read_clips(run_dir, size, digests.get(size))
        total += len(before)
        missing += before.take(np.flatnonzero(keys.rows_of(before) < 0))
        new += keys.take(np.flatnonzero(before.rows_of(keys) < 0))
    swapped = sorted({*missing} & {*held_out} | {*new} & {*held_out_before})
    if swapped:
        raise ValueError(
            f"{run_dir} holds a run that started with train.validation.clips="
            f"{len(held_out_before)}; another number would train on clips that were held out, or "
            f"hold out clips that were trained on: {_abbreviate(swapped)}. Set it to that number, "
            "or choose another train.run_dir"
        )
    if new:
        manifest = _write_new_clips(run_dir, new, leave_out)
        raise ValueError(
            f"{run_dir} holds a run on {total} clips, but there are {len(new)} to train on now "
            f"that it did not start with: {_abbreviate(new)}. To continue without them, set "
            f"train.leave_out={manifest}, which lists them; to train on them, choose another "
            "train.run_dir"
        )
    if not missing:
        return None
    return (
        f"{len(missing)} of the {total} clips that the run started with are missing or left out "
        f"now: {_abbreviate(missing)}. It continues with the {total - len(missing)} others, whose "
        "order is redrawn from the seed: in the current epoch, some may appear twice and others "
        "not at all"
    )


def _path(run_dir: Path, size: str) -> Path:
    return run_dir / _FOLDER / f"{size}.txt"


def _read_clips(run_dir: Path, size: str, expected: str | None) -> SortedText:
    path = _path(run_dir, size)
    try:
        keys = SortedText.from_utf8(path.read_bytes().split(b"\n")[:-1])
        problem = None if digest(keys) == expected else "is not what the run wrote"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem is not None:
        raise ValueError(
            f"the clips are not those that the run in {run_dir} started with, and {path}, which "
            f"lists them, {problem}; restore it, or choose another train.run_dir"
        )
    return keys


def _write_new_clips(run_dir: Path, new: Sequence[str], leave_out: Path | None) -> Path:
    """Write a manifest of the new clips and of those in `leave_out`; returns its path."""
    path = run_dir / _NEW_CLIPS_FILE
    text = "" if leave_out is None else leave_out.expanduser().read_text(encoding="utf-8")
    listed = (line for line in text.split("\n") if line)  # splitlines would also split within keys
    lines = [*listed, *(json.dumps({"key": key}) for key in dict.fromkeys(new))]
    data = "".join(f"{line}\n" for line in lines).encode()
    write_atomic(path, data, temporary=path.with_name(f".{path.name}.partial"))
    return path


def _abbreviate(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MAX_KEYS_SHOWN} more" if len(keys) > _MAX_KEYS_SHOWN else ""
    return ", ".join(map(repr, keys[:_MAX_KEYS_SHOWN])) + more
