"""What commands print of clips that are left out: one line a clip, some of them."""

from collections.abc import Iterable
from typing import Protocol

_SHOWN = 20


class _Skipped(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def detail(self) -> str: ...


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
