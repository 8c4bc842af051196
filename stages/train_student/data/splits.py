"""Clips that a run does not train on: excluded, missing from some store, or held out for
validation; and the lists of the clips that it started with.

    <run_dir>/
        clips/9x32x48.txt      keys of the training clips of a size, one per line
        new_clips.jsonl        clips added to the cache since, for train.leave_out

Held-out clips are chosen by the hash of the key, so the choice does not depend on the seed or on
the order of clips, and new clips change it only if their hashes are lower. A run may resume with
fewer clips, but not with others; a clip stays on one side of the split for the whole run.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cache_schema import SkippedClip, SortedText
from cache_schema.atomic_io import make_directories, write_atomic
from cache_schema.checksummed_json import parse_json
from cache_schema.shown_text import first_few


@dataclass(frozen=True, kw_only=True, slots=True)
class ExcludedClips:
    """Numbers of excluded clips, as in run.json."""

    not_in_every_store: dict[str, int]
    """By kind: clips that some other kind lacks."""
    skipped: dict[str, dict[str, int]]
    """By kind and reason: clips that extraction skipped."""
    manifest: str | None
    """Path of the manifest `train.leave_out`."""
    named: int
    """Clips present in every store that the manifest excludes."""

    def describe(self) -> list[str]:
        """Clauses for the log, one per reason of exclusion."""
        clauses = []
        lacking = [f"{n} of {kind}" for kind, n in self.not_in_every_store.items() if n]
        if lacking:
            clauses.append(f"left out, not in every store: {', '.join(lacking)}")
        skipped = [
            f"{sum(reasons.values())} of {kind} "
            f"({', '.join(f'{reason} {count}' for reason, count in reasons.items())})"
            for kind, reasons in self.skipped.items()
            if reasons
        ]
        if skipped:
            clauses.append(f"skipped by extraction: {', '.join(skipped)}")
        if self.manifest is not None:
            clauses.append(f"left out by {self.manifest}: {self.named}")
        return clauses


def count_reasons(skipped: tuple[SkippedClip, ...]) -> dict[str, int]:
    """Count skipped clips by reason, the most frequent first."""
    counts = Counter(clip.reason for clip in skipped)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_keys(manifest: Path) -> frozenset[str]:
    """Read the keys of a manifest: JSON lines, each an object with a `key`.

    Other members (as in extraction's failures.jsonl) and empty lines are ignored.

    Raises:
        ValueError: the file cannot be read, or a line has no key; names the line.
    """
    try:
        text = manifest.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"train.leave_out {manifest} cannot be read ({error}); give a JSON lines file with a "
            "key per line, such as the cache's failures.jsonl, or null"
        ) from error
    keys = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            keys.add(_key(line, f"{manifest} line {number}"))
    return frozenset(keys)


def _key(line: str, place: str) -> str:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}): {line[:80]!r}") from error
    key = found.get("key") if isinstance(found, dict) else None
    if not isinstance(key, str) or not key:
        raise ValueError(
            f'{place} names no clip; expected an object with a key, such as {{"key": '
            f'"00000/walk"}}, got {line[:80]!r}'
        )
    return key


def choose_held_out(keys: Sequence[Iterable[str]], count: int) -> tuple[str, ...]:
    """The `count` keys with the lowest hashes, lowest first; all keys if there are fewer.

    Args:
        keys: keys of every bucket; a key in several buckets counts once.
    """
    if count == 0:
        return ()
    ranked: set[tuple[bytes, str]] = set()
    for of_bucket in keys:
        ranked.update(heapq.nsmallest(count, ((_rank(key), key) for key in of_bucket)))
    return tuple(key for _, key in heapq.nsmallest(count, ranked))


def seed_of_held_out(key: str, timestep: int) -> int:
    """63-bit seed of a held-out clip's random numbers at a timestep."""
    digest = blake2b(f"{timestep}/{key}".encode(), digest_size=8, person=b"validation")
    return int.from_bytes(digest.digest(), "little") >> 1


def _rank(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=8, person=b"held out").digest()


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
        path = run_dir / _FOLDER / f"{size}.txt"
        write_atomic(path, data)


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


def _read_clips(run_dir: Path, size: str, expected: str | None) -> SortedText:
    path = run_dir / _FOLDER / f"{size}.txt"
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
    write_atomic(path, data)
    return path


def _abbreviate(keys: Sequence[str]) -> str:
    return first_few([repr(key) for key in keys], _MAX_KEYS_SHOWN)
