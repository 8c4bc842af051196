"""Rows about a written store, and notes on skipped clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipeline.console import format_bytes, format_time

if TYPE_CHECKING:
    from cache_schema import SkippedClip
    from stages.extract_features.summary import KindSummary

_MAX_NOTES = 20


def store_rows(name: str, written: KindSummary) -> list[tuple[str, str]]:
    """Rows about a store that a run has written to."""
    there = f", {written.clips_already_there} already there" if written.clips_already_there else ""
    skipped = f"{len(written.skipped)} ({count_by_reason(written.skipped)})"
    return [
        (name, str(written.store)),
        ("  clips", f"{written.clips_written} written{there}"),
        ("  skipped", skipped if written.skipped else "none"),
        ("  size, time", f"{format_bytes(written.bytes)}, {format_time(written.seconds)}"),
    ]


def count_by_reason(skipped: Sequence[SkippedClip]) -> str:
    """Count skipped clips by reason, the most frequent first: 2 too_short."""
    counts = Counter(clip.reason for clip in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def skipped_notes(skipped: Iterable[tuple[str, SkippedClip]], verb: str = "skipped") -> list[str]:
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
