"""Reads a clip's properties from its container, without decoding."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stages.clips.colour import colour_of
from stages.clips.config import ClipsConfig
from stages.clips.decoding import VideoError, interlaced_in_headers, open_stream, stream_name
from stages.clips.loading import hdr_skipped, interlaced_skipped, plan_clip, target_fps
from stages.clips.records import ClipRecord, ClipSkipped
from stages.clips.timeline import read_timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipProbe:
    """Properties of a source video according to its headers."""

    width: int
    """Stored width in pixels, before any rotation requested by the file."""
    height: int
    fps: Fraction
    """Average over the whole file, or a guess."""
    num_frames: int | None
    """Frames of the source; None if the headers do not state it."""
    conversions: tuple[str, ...] = ()
    """As `FrameGeometry.conversions`."""


def probe_clip(record: ClipRecord, config: ClipsConfig) -> ClipProbe:
    """Read a clip's headers; also its packet times if its rate or length may be insufficient.

    Headers can be wrong: only `load_clip`, which decodes, is conclusive.

    Raises:
        ClipSkipped: undecodable, hdr, interlaced, fps_too_low or too_short, if the headers show it.
    """
    try:
        probe = _read_headers(record, config)
        if _may_be_skipped(probe, config):
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
            raise hdr_skipped(colour.hdr)
        if config.interlaced == "skip" and interlaced:
            raise interlaced_skipped()
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


def _may_be_skipped(probe: ClipProbe, config: ClipsConfig) -> bool:
    """Whether the clip would be too short or its rate too low if the headers are accurate."""
    fps = target_fps(config)
    if fps is not None and probe.fps < fps:
        return True
    if probe.num_frames is None:
        return False
    taken = probe.num_frames if fps is None else math.ceil(probe.num_frames / probe.fps * fps)
    return taken <= config.num_frames


def _num_frames(container: Any, stream: Any, fps: Fraction) -> int | None:
    if stream.frames:
        return int(stream.frames)
    # Headers of fragmented files state 0 for unknown durations.
    if stream.duration and stream.time_base:
        return round(stream.duration * Fraction(stream.time_base) * fps) or None
    if container.duration:  # microseconds
        return round(container.duration * fps / 1_000_000) or None
    return None
