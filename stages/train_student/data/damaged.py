"""Clips that cannot be read, and which clips stand in for them; the dataset asks here.

Which clip stands in follows from the sample's number alone, as everything else about a sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from cache_schema import CacheError, ClipChanged, ClipMissing, CorruptClip
from stages.train_student.data.order import hashed

ATTEMPTS = 8
"""How many damaged clips are met for one sample; where there are so many, the cache is damaged."""

GONE_ATTEMPTS = 1000
"""How many clips are tried for one sample where clips were taken out of the cache: one that is left
is found even where 99 of 100 were."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedClip:
    """A clip that was to be shown and could not be read."""

    key: str
    message: str
    """What is wrong, and where."""
    gone: bool
    """Whether it was taken out of its store, or made again with other values, since the run opened
    it; otherwise it is damaged."""

    @classmethod
    def because_of(cls, error: CacheError, key: str) -> Self:
        """What reading the clip raised: one of `UNREADABLE`."""
        return cls(key=key, message=str(error), gone=not isinstance(error, CorruptClip))


UNREADABLE = (CorruptClip, ClipMissing, ClipChanged)
"""What is raised for a clip in whose place another can stand."""


def read_or_replace(
    read: Callable[[int], T],
    key_of: Callable[[int], str],
    clip: int,
    *,
    sample: int,
    num_clips: int,
    seed: int,
) -> tuple[int, T, tuple[DamagedClip, ...]]:
    """What `read` says of a clip, or of the first one in its place that can be read.

    Args:
        read: reads the clip of that index.
        key_of: the clip's key.
        clip: the one to show.
        sample: number of the sample, which decides the others.
        num_clips: among how many they are chosen.
        seed: of the run.

    Returns:
        Index of the clip read, what was read, and the clips that could not be: the sample's own
        clip, and the damaged ones among those tried in its place.

    Raises:
        CorruptClip: of the clips tried `ATTEMPTS` are damaged.
        ClipMissing: all of `GONE_ATTEMPTS` clips are gone.
        StoreUnreachable: nothing is known of the clip; that is not its fault.
    """
    found: list[DamagedClip] = []
    damaged = 0
    for attempt in range(1, GONE_ATTEMPTS + 1):
        try:
            return clip, read(clip), tuple(found)
        except UNREADABLE as error:
            unreadable, last = DamagedClip.because_of(error, key_of(clip)), error
        if attempt == 1 or not unreadable.gone:
            found.append(unreadable)
        damaged += not unreadable.gone
        if damaged == ATTEMPTS:
            raise CorruptClip(
                f"{ATTEMPTS} of {attempt} clips tried in a row cannot be read, the last one "
                f"because {last}"
            ) from last
        clip = hashed(f"{seed}/sample/{sample}/instead/{attempt}") % num_clips
    raise ClipMissing(
        f"{GONE_ATTEMPTS} clips in a row are gone since the run opened its stores, the last one "
        f"because {last}; run the same command again: it goes on with the clips that are left"
    ) from last
