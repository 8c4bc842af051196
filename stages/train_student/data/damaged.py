"""Clips that cannot be read, and which clips stand in for them; the dataset asks here.

Which clip stands in follows from the sample's number alone, as everything else about a sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cache_schema import ClipMissing, CorruptClip
from stages.train_student.data.order import hashed

ATTEMPTS = 8
"""How many clips are tried for one sample; where so many are damaged, the cache is."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedClip:
    """A clip that was to be shown and could not be read."""

    key: str
    message: str
    """What is wrong, and where."""


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
        Index of the clip read, what was read, and the clips that could not be.

    Raises:
        CorruptClip: `ATTEMPTS` clips in a row are damaged.
        StoreUnreachable: nothing is known of the clip; that is not its fault.
    """
    damaged: list[DamagedClip] = []
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return clip, read(clip), tuple(damaged)
        except (CorruptClip, ClipMissing) as error:
            if attempt == ATTEMPTS:
                raise CorruptClip(
                    f"{ATTEMPTS} clips in a row cannot be read, the last one because {error}"
                ) from error
            damaged.append(DamagedClip(key=key_of(clip), message=str(error)))
        clip = hashed(f"{seed}/sample/{sample}/instead/{attempt}") % num_clips
    raise AssertionError("the last attempt returns or raises")
