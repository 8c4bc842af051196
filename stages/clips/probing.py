"""What a clip's container says of it, nothing decoded; used to estimate stage one's work and to
choose among sizes."""

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
    fps: Fraction
    num_frames: int | None
    """Of the source, as far as the headers tell; None when they do not."""


def probe_clip(record: ClipRecord, config: ClipsConfig) -> ClipProbe:
    """Read a clip's headers.

    They can be wrong: `load_clip`, which decodes, has the last word.

    Raises:
        ClipSkipped: undecodable, fps_too_low or too_short, where the headers already tell.
    """
    probe = read_headers(record)
    taken = frames_at(probe, config)
    if taken is not None and taken < config.num_frames:
        raise too_short(taken, config)
    return probe


def read_headers(record: ClipRecord) -> ClipProbe:
    """What a clip's headers say, whatever it is used for.

    Raises:
        ClipSkipped: undecodable.
    """
    try:
        with open_stream(record.video) as (container, stream, fps):
            context = stream.codec_context
            return ClipProbe(
                width=context.width,
                height=context.height,
                fps=fps,
                num_frames=_num_frames(container, stream, fps),
            )
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error


def frames_at(probe: ClipProbe, config: ClipsConfig) -> int | None:
    """How many frames the video gives at the asked rate; None when its headers do not tell.

    Raises:
        ClipSkipped: fps_too_low.
    """
    consecutive = sampling_of(probe.fps, config) == "consecutive"
    if probe.num_frames is None or consecutive:
        return probe.num_frames
    # As many as instants k / fps fall into its duration.
    assert config.fps is not None
    duration = probe.num_frames / probe.fps
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
