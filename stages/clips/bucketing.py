"""Assigns each clip to a bucket (a training size), by its aspect ratio, length and resolution.

The result depends only on the clip and the set of sizes, not on their order.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from stages.clips.config import ClipsConfig
from stages.clips.loading import MAX_DECODED_FRAMES, target_fps
from stages.clips.records import BadRecord, ClipRecord, ClipSkipped
from stages.clips.timing import Timeline, choose_frames, decode_timeline, read_timeline
from stages.clips.video.decoding import open_video
from stages.clips.video.streams import VideoError

_SHAPE_TOLERANCE = 0.03
"""Log aspect ratios this close to the nearest count as equally near: sizes are multiples of 16, so
those of one shape, such as 480x848 and 720x1280, differ by some percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Properties of a clip that determine its bucket."""

    height: int
    """Height of the upright frame, pixels."""
    width: float
    """Width of the upright frame, in square pixels."""
    lengths: frozenset[int]
    """Numbers of frames among the sizes that the video can fill at the configured fps."""


def is_in_bucket(record: ClipRecord | BadRecord, size: ClipsConfig) -> bool:
    """Whether a clip is assigned to `size`, one of `ClipsConfig.sizes`; True without buckets."""
    return not size.buckets or bucket_of(record, size).size_name == size.size_name


def bucket_of(record: ClipRecord | BadRecord, config: ClipsConfig) -> ClipsConfig:
    """The size of `config.sizes` that fits a clip best.

    Selects the sizes of the nearest aspect ratio (in log space), among them those with the most
    frames that the clip can fill, and among them the largest that needs no upscaling. A clip that
    is too short or too small for all gets the fewest frames or the smallest size, as does one that
    cannot be read; loading it reports the reason.
    """
    sizes = sorted(
        config.sizes, key=lambda size: (size.height * size.width, size.num_frames, size.size_name)
    )
    if len(sizes) == 1:
        return sizes[0]
    try:
        source = _source(record, config) if isinstance(record, ClipRecord) else None
    except VideoError:
        source = None
    if source is None:
        return min(sizes, key=lambda size: size.num_frames)
    distances = {size.size_name: _distance(source, size) for size in sizes}
    limit = min(distances.values()) + _SHAPE_TOLERANCE
    nearest = [size for size in sizes if distances[size.size_name] <= limit]
    lengths = [size.num_frames for size in nearest]
    length = max(source.lengths & set(lengths), default=min(lengths))
    candidates = [size for size in nearest if size.num_frames == length]
    large_enough = [  # without upscaling
        size for size in candidates if source.height >= size.height and source.width >= size.width
    ]
    return large_enough[-1] if large_enough else candidates[0]


def _source(record: ClipRecord, config: ClipsConfig) -> _Source:
    # The orientation is only known once a frame is decoded.
    with open_video(record.video) as (info, frames):
        height, width = next(frames).shape
    return _Source(height=height, width=width * info.pixel_aspect, lengths=_lengths(record, config))


def _lengths(record: ClipRecord, config: ClipsConfig) -> frozenset[int]:
    lengths = {size.num_frames for size in config.sizes}
    fps, max_frames = target_fps(config), max(lengths)
    seconds = Fraction(0) if fps is None else max_frames / fps
    timeline: Timeline | None = None
    for read in (read_timeline, decode_timeline):
        timeline = timeline or read(
            record.video, num_frames=max_frames, seconds=seconds, limit=MAX_DECODED_FRAMES
        )
    assert timeline is not None  # decode_timeline never returns None
    found = set()
    for length in lengths:
        try:
            choice = choose_frames(timeline, num_frames=length, fps=fps)
        except ClipSkipped:  # fps_too_low
            continue
        if len(choice.indices) == length:
            found.add(length)
    return frozenset(found)


def _distance(source: _Source, size: ClipsConfig) -> float:
    return abs(math.log(source.width / source.height) - math.log(size.width / size.height))
