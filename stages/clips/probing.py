"""What a clip's container says of it, nothing decoded; used to estimate stage one's work."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stages.clips.config import ClipsConfig
from stages.clips.loading import sampling_of, too_short
from stages.clips.records import ClipRecord, ClipSkipped
from stages.clips.video import VideoError, open_stream


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipProbe:
    """A source video by its headers."""

    width: int
    """Pixels as stored, before a rotation that the file asks for."""
    height: int
    fps: float
    num_frames: int | None
    """Of the source, as far as the headers tell; None when they do not."""


def probe_clip(record: ClipRecord, config: ClipsConfig) -> ClipProbe:
    """Read a clip's headers.

    They can be wrong: `load_clip`, which decodes, has the last word.

    Raises:
        ClipSkipped: undecodable, fps_too_low or too_short, where the headers already tell.
    """
    try:
        with open_stream(record.video) as (container, stream, fps):
            num_frames = _num_frames(container, stream, fps)
            context = stream.codec_context
            width, height = context.width, context.height
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error
    consecutive = sampling_of(fps, config) == "consecutive"
    if num_frames is not None:
        taken = num_frames if consecutive else _instants(num_frames / fps, config)
        if taken < config.num_frames:
            raise too_short(taken, config)
    return ClipProbe(width=width, height=height, fps=float(fps), num_frames=num_frames)


def _instants(duration: Fraction, config: ClipsConfig) -> int:
    """How many instants k / fps fall into the duration (seconds)."""
    assert config.fps is not None
    return math.ceil(duration * Fraction(config.fps).limit_denominator(1001))


def _num_frames(container: Any, stream: Any, fps: Fraction) -> int | None:
    if stream.frames:
        return int(stream.frames)
    # A fragmented file's headers say 0 where they do not know.
    if stream.duration and stream.time_base:
        return round(stream.duration * Fraction(stream.time_base) * fps) or None
    if container.duration:  # microseconds
        return round(container.duration * fps / 1_000_000) or None
    return None
