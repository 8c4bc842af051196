"""What a clip's container says of it, nothing decoded; used to estimate stage one's work."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stages.clips.colour import colour_of
from stages.clips.config import ClipsConfig
from stages.clips.decoding import VideoError, interlaced_in_headers, open_stream, stream_name
from stages.clips.loading import hdr_unwanted, interlaced_unwanted, plan_clip, rate_of
from stages.clips.records import ClipRecord, ClipSkipped
from stages.clips.timeline import read_timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipProbe:
    """A source video by its headers."""

    width: int
    """Pixels as stored, before a rotation that the file asks for."""
    height: int
    fps: Fraction
    """An average over the whole file, or a guess."""
    num_frames: int | None
    """Of the source, as far as the headers tell; None when they do not."""
    conversions: tuple[str, ...] = ()
    """As `FrameGeometry.conversions`."""


def probe_clip(record: ClipRecord, config: ClipsConfig) -> ClipProbe:
    """Read a clip's headers; where by them it would be too slow or too short, its packets' times.

    They can be wrong: `load_clip`, which decodes, has the last word.

    Raises:
        ClipSkipped: undecodable, hdr, interlaced, fps_too_low or too_short, where they tell.
    """
    try:
        probe = _read_headers(record, config)
        if _in_doubt(probe, config):
            plan_clip(record, config, read_timeline)
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error
    return probe


def _read_headers(record: ClipRecord, config: ClipsConfig) -> ClipProbe:
    with open_stream(record.video) as (container, stream, fps):
        context = stream.codec_context
        colour, interlaced = colour_of(context), interlaced_in_headers(stream)
        if colour.problem:
            raise VideoError(colour.problem)
        if config.hdr == "skip" and colour.hdr:
            raise hdr_unwanted(colour.hdr)
        if config.interlaced == "skip" and interlaced:
            raise interlaced_unwanted()
        name = stream_name(container, stream)
        return ClipProbe(
            width=context.width,
            height=context.height,
            fps=fps,
            num_frames=_num_frames(container, stream, fps),
            conversions=(
                *((name,) if name else ()),
                *(("deinterlaced",) if interlaced else ()),
                *colour.conversions,
            ),
        )


def _in_doubt(probe: ClipProbe, config: ClipsConfig) -> bool:
    """Whether the headers, if they were right of every part of the video, ask for a skip."""
    fps = rate_of(config)
    if fps is not None and probe.fps < fps:
        return True
    if probe.num_frames is None:
        return False
    taken = probe.num_frames if fps is None else math.ceil(probe.num_frames / probe.fps * fps)
    return taken <= config.num_frames


def _num_frames(container: Any, stream: Any, fps: Fraction) -> int | None:
    if stream.frames:
        return int(stream.frames)
    # A fragmented file's headers say 0 where they do not know.
    if stream.duration and stream.time_base:
        return round(stream.duration * Fraction(stream.time_base) * fps) or None
    if container.duration:  # microseconds
        return round(container.duration * fps / 1_000_000) or None
    return None
