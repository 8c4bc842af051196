"""Replacement of clips that cannot be read.

The replacement depends only on the sample's number, like everything else about a sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from cache_schema import CacheError, ClipChanged, ClipMissing, CorruptClip
from stages.train_student.data.order import hash63

ATTEMPTS = 8
"""Maximum damaged clips tried for one sample; so many mean that the cache is damaged."""

GONE_ATTEMPTS = 1000
"""Maximum clips tried for one sample if clips were removed from the cache; enough to find a
remaining one even after 99 of 100 were removed."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedClip:
    """A clip that could not be read."""

    key: str
    message: str
    """The error, with the file."""
    gone: bool
    """Whether the clip was removed from its store, or rewritten with other values, since the run
    opened it; otherwise it is damaged."""

    @classmethod
    def from_error(cls, error: CacheError, key: str) -> Self:
        """Build from the error that reading the clip raised, one of `UNREADABLE`."""
        return cls(key=key, message=str(error), gone=not isinstance(error, CorruptClip))


UNREADABLE = (CorruptClip, ClipMissing, ClipChanged)
"""Errors of a clip that can be replaced by another."""


def read_or_replace(
    read: Callable[[int], T],
    key_of: Callable[[int], str],
    clip: int,
    *,
    sample: int,
    num_clips: int,
    seed: int,
) -> tuple[int, T, tuple[DamagedClip, ...]]:
    """Read a clip or, if it is unreadable, the first readable replacement.

    Args:
        read: reads the clip with an index.
        key_of: returns the key of the clip with an index.
        clip: index of the sample's own clip.
        sample: number of the sample, which determines the replacements.
        num_clips: number of clips to choose from.
        seed: seed of the run.

    Returns:
        Index of the clip that was read, the result of `read`, and the unreadable clips: the
        sample's own, and the damaged ones among the replacements that were tried.

    Raises:
        CorruptClip: `ATTEMPTS` of the clips tried are damaged.
        ClipMissing: all of `GONE_ATTEMPTS` clips are gone.
        StoreUnreachable: the cache cannot be reached; nothing is known about the clip.
    """
    found: list[DamagedClip] = []
    damaged = 0
    for attempt in range(1, GONE_ATTEMPTS + 1):
        try:
            return clip, read(clip), tuple(found)
        except UNREADABLE as error:
            unreadable, last = DamagedClip.from_error(error, key_of(clip)), error
        if attempt == 1 or not unreadable.gone:
            found.append(unreadable)
        damaged += not unreadable.gone
        if damaged == ATTEMPTS:
            raise CorruptClip(
                f"{ATTEMPTS} of {attempt} clips tried in a row cannot be read; the last error: "
                f"{last}"
            ) from last
        clip = hash63(f"{seed}/sample/{sample}/instead/{attempt}") % num_clips
    raise ClipMissing(
        f"{GONE_ATTEMPTS} clips in a row were removed or rewritten since the run opened its "
        f"stores; the last error: {last}; run the same command again to continue with the "
        "remaining clips"
    ) from last
