"""Rows about a written store, and notes on skipped clips."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.console import format_bytes, format_time

_MAX_NOTES = 20


class _Skipped(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def detail(self) -> str: ...


class _WrittenStore(Protocol):
    @property
    def store(self) -> Path: ...
    @property
    def clips_written(self) -> int: ...
    @property
    def clips_already_there(self) -> int: ...
    @property
    def skipped(self) -> Sequence[_Skipped]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def store_rows(name: str, written: _WrittenStore) -> list[tuple[str, str]]:
    """Rows about a store that a run has written to."""
    there = f", {written.clips_already_there} already there" if written.clips_already_there else ""
    skipped = f"{len(written.skipped)} ({count_by_reason(written.skipped)})"
    return [
        (name, str(written.store)),
        ("  clips", f"{written.clips_written} written{there}"),
        ("  skipped", skipped if written.skipped else "none"),
        ("  size, time", f"{format_bytes(written.bytes)}, {format_time(written.seconds)}"),
    ]


def count_by_reason(skipped: Sequence[_Skipped]) -> str:
    """Count skipped clips by reason, the most frequent first: 2 too_short."""
    counts = Counter(clip.reason for clip in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def skipped_notes(skipped: Iterable[tuple[str, _Skipped]], verb: str = "skipped") -> list[str]:
    """A line for each skipped clip: kinds of store, key, reason.

    Args:
        skipped: Kind and clip. Kinds that skipped a clip for the same reason share a line.
        verb: Printed between the kinds and the clip.
    """
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for kind, clip in skipped:
        kinds.setdefault((clip.key, clip.reason, clip.detail), []).append(kind)
    notes = [
        f"{', '.join(names)} {verb} {key}: {reason} ({detail})"
        for (key, reason, detail), names in kinds.items()
    ]
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES:] = [f"… and {len(notes) - _MAX_NOTES} more; --json lists them"]
    return notes
