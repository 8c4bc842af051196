"""What commands print of clips that are left out: how many for which reason, and which."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

_SHOWN = 20


class _Skipped(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def detail(self) -> str: ...


def counted_reasons(skipped: Sequence[_Skipped]) -> str:
    """Write how many were left out for each reason, the most frequent first: 2 too_short."""
    counts = Counter(clip.reason for clip in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def skipped_notes(skipped: Iterable[tuple[str, _Skipped]], verb: str = "skipped") -> list[str]:
    """Say which clips were left out of which kinds of store, and why.

    Args:
        skipped: Kind and clip. What is said of one clip by several kinds becomes one line.
        verb: Between the kinds and the clip.
    """
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for kind, clip in skipped:
        kinds.setdefault((clip.key, clip.reason, clip.detail), []).append(kind)
    notes = [
        f"{', '.join(names)} {verb} {key}: {reason} ({detail})"
        for (key, reason, detail), names in kinds.items()
    ]
    if len(notes) > _SHOWN:
        notes[_SHOWN:] = [f"… and {len(notes) - _SHOWN} more; --json lists them"]
    return notes
