"""Which of several sizes a clip is brought to, from its frames' times and its first frame.

Used by stage one; every clip goes to exactly one size, whoever asks and in whatever order they are
given.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from stages.clips.config import ClipsConfig
from stages.clips.decoding import VideoError, open_video
from stages.clips.limits import MAX_DECODED_FRAMES
from stages.clips.loading import rate_of
from stages.clips.records import BadRecord, ClipRecord, ClipSkipped
from stages.clips.timeline import decode_timeline, read_timeline
from stages.clips.timing import Timeline, choose_frames

_EQUAL_SHAPES = 0.03
"""Sizes are multiples of 16: ratios of one shape, such as 480x848 and 720x1280, differ by some
percent, and shapes as near as this to the nearest count as equally near."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What decides about a clip."""

    height: int
    """Of the upright frame."""
    width: float
    """In pixels as high as wide."""
    lengths: frozenset[int]
    """Of the sizes' lengths, those that it has at the asked rate."""


def belongs(record: ClipRecord | BadRecord, size: ClipsConfig) -> bool:
    """Whether a clip goes to this size, one of `ClipsConfig.sizes`; all do without buckets."""
    return not size.buckets or bucket_of(record, size).size_name == size.size_name


def bucket_of(record: ClipRecord | BadRecord, config: ClipsConfig) -> ClipsConfig:
    """The size of `config.sizes` that fits a clip best.

    Those of the nearest shape, by the logarithm of width over height; of them, those of the most
    frames that the clip has; of them, the largest that needs no enlarging. A clip too short or too
    small for all gets the fewest frames or the smallest frame; so does one that cannot be read,
    and loading says why.
    """
    sizes = sorted(config.sizes, key=lambda size: (_area(size), size.num_frames, size.size_name))
    if len(sizes) == 1:
        return sizes[0]
    try:
        source = _source(record, config) if isinstance(record, ClipRecord) else None
    except VideoError:
        source = None
    if source is None:
        return min(sizes, key=lambda size: size.num_frames)
    far = {size.size_name: _distance(source, size) for size in sizes}
    limit = min(far.values()) + _EQUAL_SHAPES
    near = [size for size in sizes if far[size.size_name] <= limit]
    lengths = [size.num_frames for size in near]
    length = max(source.lengths & set(lengths), default=min(lengths))
    of_length = [size for size in near if size.num_frames == length]
    covered = [size for size in of_length if _is_covered(source, size)]
    return covered[-1] if covered else of_length[0]


def _source(record: ClipRecord, config: ClipsConfig) -> _Source:
    # Only a decoded frame tells how the file wants it turned.
    with open_video(record.video) as (info, frames):
        height, width = next(frames).shape
    return _Source(height=height, width=width * info.pixel_aspect, lengths=_lengths(record, config))


def _lengths(record: ClipRecord, config: ClipsConfig) -> frozenset[int]:
    lengths = {size.num_frames for size in config.sizes}
    fps, most = rate_of(config), max(lengths)
    seconds = Fraction(0) if fps is None else most / fps
    timeline: Timeline | None = None
    for read in (read_timeline, decode_timeline):
        timeline = timeline or read(
            record.video, num_frames=most, seconds=seconds, limit=MAX_DECODED_FRAMES
        )
    assert timeline is not None  # a decoder always tells
    found = set()
    for length in lengths:
        try:
            choice = choose_frames(timeline, num_frames=length, fps=fps)
        except ClipSkipped:  # its rate is too low
            continue
        if len(choice.indices) == length:
            found.add(length)
    return frozenset(found)


def _distance(source: _Source, size: ClipsConfig) -> float:
    return abs(math.log(source.width / source.height) - math.log(size.width / size.height))


def _is_covered(source: _Source, size: ClipsConfig) -> bool:
    return source.height >= size.height and source.width >= size.width


def _area(size: ClipsConfig) -> int:
    return size.height * size.width
