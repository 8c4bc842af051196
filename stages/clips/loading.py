"""Loads the clip of a record at the training size, length and frame rate; probes its headers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from stages.clips.config import ClipsConfig
from stages.clips.geometry import FrameGeometry, cover_and_crop
from stages.clips.records import Clip, ClipRecord, ClipSkipped, SubjectPrompt
from stages.clips.timing import FrameChoice, Timeline, choose_frames, decode_timeline, read_timeline
from stages.clips.video.colour import Colour, colour_of
from stages.clips.video.decoding import VideoInfo, open_video
from stages.clips.video.streams import VideoError, interlaced_in_headers, open_stream, stream_name

MAX_DECODED_FRAMES = 100_000
"""Maximum number of frames decoded per clip: 49 frames at 8 fps from a source of 16,000 fps."""

_TimelineReader = Callable[..., Timeline | None]
"""`read_timeline` or `decode_timeline`."""


def load_clip(record: ClipRecord, config: ClipsConfig) -> Clip:
    """Decode a clip at the configured rate, length and size, starting at the first frame.

    Frames are selected by `timing.choose_frames`, which never repeats a source frame. They are
    turned upright, deinterlaced, converted to SDR BT.709, and resized by
    `geometry.cover_and_crop`. Subjects outside the crop are dropped; `Clip.prompt_problem` gives
    the reason if none is left on frame 0.

    Raises:
        ClipSkipped: undecodable, too_short or fps_too_low; hdr or interlaced if the settings
            exclude them.
    """
    try:
        for read in (read_timeline, decode_timeline):
            planned = _plan_clip(record, config, read)
            clip = planned and _load(record, config, *planned)
            if clip:
                return clip
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error
    raise ClipSkipped("undecodable", "its frame times differ when it is decoded again")


def _plan_clip(
    record: ClipRecord, config: ClipsConfig, read: _TimelineReader
) -> tuple[Timeline, FrameChoice] | None:
    """Read the timeline of a video and choose the frames of the clip.

    Args:
        record: The clip.
        config: Length and frame rate of the clip.
        read: `read_timeline` or `decode_timeline`.

    Returns:
        The timeline and exactly `config.num_frames` frames; None if `read_timeline` returns None.

    Raises:
        ClipSkipped: too_short or fps_too_low.
        VideoError: As `read`; also if the clip needs more than `MAX_DECODED_FRAMES` frames.
    """
    fps = target_fps(config)
    seconds = Fraction(0) if fps is None else config.num_frames / fps
    timeline = read(
        record.video, num_frames=config.num_frames, seconds=seconds, limit=MAX_DECODED_FRAMES
    )
    if timeline is None:
        return None
    choice = choose_frames(timeline, num_frames=config.num_frames, fps=fps)
    complete = len(choice.indices) == config.num_frames
    if (not complete and timeline.end is None) or choice.indices[-1] >= MAX_DECODED_FRAMES:
        raise VideoError(f"the clip needs more than the first {MAX_DECODED_FRAMES:,} frames")
    if not complete:
        raise _too_short(record, choice, config)
    return timeline, choice


def target_fps(config: ClipsConfig) -> Fraction | None:
    """Configured frames per second; None for frames as stored."""
    return None if config.fps is None else Fraction(config.fps).limit_denominator(1001)


def _load(
    record: ClipRecord, config: ClipsConfig, timeline: Timeline, choice: FrameChoice
) -> Clip | None:
    """Decode the clip; None if the decoded frame times differ from the timeline."""
    geometry: FrameGeometry | None = None
    images_HWC: list[np.ndarray] = []
    conversions: dict[str, None] = {}
    wanted = set(choice.indices)
    with open_video(record.video) as (info, frames):
        for index, frame in enumerate(islice(frames, choice.indices[-1] + 1)):
            if index >= len(timeline.times) or frame.time != timeline.times[index]:
                return None
            _check_allowed(frame.colour, frame.interlaced, config)
            if index not in wanted:
                continue
            image_HWC = frame.image()
            geometry = geometry or _geometry(image_HWC, info, config, choice)
            images_HWC.append(geometry.frame(image_HWC))
            conversions |= dict.fromkeys(frame.conversions)
    if geometry is None or len(images_HWC) < config.num_frames:
        return None
    stream = () if info.stream is None else (info.stream,)
    prompts, problem = _to_training_frame(record.prompts, geometry)
    try:
        last_frame_prompts = _cropped_prompts(record.last_frame_prompts, geometry)
    except ValueError as error:
        prompts, last_frame_prompts, problem = (), (), f"last_frame: {error}"
    return Clip(
        key=record.key,
        frames_THWC=np.stack(images_HWC),
        geometry=replace(geometry, conversions=(*stream, *conversions)),
        caption=record.caption,
        prompts=prompts,
        last_frame_prompts=last_frame_prompts,
        phrase=record.phrase,
        prompt_problem=problem,
    )


def _check_allowed(colour: Colour, interlaced: bool, config: ClipsConfig) -> None:
    """Reject HDR or interlaced video if the settings exclude it."""
    if config.hdr == "skip" and colour.hdr:
        raise ClipSkipped("hdr", f"its frames are HDR ({colour.hdr}), and data.hdr is skip")
    if config.interlaced == "skip" and interlaced:
        raise ClipSkipped("interlaced", "its frames are interlaced, and data.interlaced is skip")


def _to_training_frame(
    prompts: Sequence[SubjectPrompt], geometry: FrameGeometry
) -> tuple[tuple[SubjectPrompt, ...], str | None]:
    """The prompts within the crop, and the reason if none is left."""
    try:
        remaining = _cropped_prompts(prompts, geometry)
    except ValueError as error:
        return (), str(error)
    if remaining or not prompts:
        return remaining, None
    kinds = ", ".join(prompt.kind for prompt in prompts)
    return (), f"the subject ({kinds}) lies outside the centre crop, or vanishes at its size"


def _cropped_prompts(
    prompts: Sequence[SubjectPrompt], geometry: FrameGeometry
) -> tuple[SubjectPrompt, ...]:
    """The prompts within the crop, in training-frame pixels.

    Raises:
        ValueError: A prompt was made for a video of a different size.
    """
    placed = [prompt.to_training_frame(geometry) for prompt in prompts]
    return tuple(prompt for prompt in placed if prompt is not None)


def _too_short(record: ClipRecord, choice: FrameChoice, config: ClipsConfig) -> ClipSkipped:
    """The outcome of a clip with too few frames, noting if its headers state more."""
    rate = "" if config.fps is None else f" at {config.fps:g} frames/s"
    detail = f"{len(choice.indices)} frames{rate}, needs {config.num_frames}"
    if choice.held_from is not None:
        detail += f"; its last frame is held from {float(choice.held_from):.3f} s on"
    with open_stream(record.video) as (_, stream, _):
        stated = stream.frames
    if choice.sampling == "consecutive" and stated >= config.num_frames:
        detail += f"; the file states {stated}, so it is truncated or damaged"
    return ClipSkipped("too_short", detail)


def _geometry(
    image_HWC: np.ndarray, info: VideoInfo, config: ClipsConfig, choice: FrameChoice
) -> FrameGeometry:
    source_height, source_width, _ = image_HWC.shape
    return cover_and_crop(
        source_height,
        source_width,
        height=config.height,
        width=config.width,
        pixel_aspect=info.pixel_aspect,
        rotation=info.orientation.rotation,
        mirrored=info.orientation.mirrored,
        source_fps=float(choice.fps),
        sampling=choice.sampling,
    )


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
            _plan_clip(record, config, read_timeline)
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error
    return probe


def _read_headers(record: ClipRecord, config: ClipsConfig) -> ClipProbe:
    with open_stream(record.video) as (container, stream, fps):
        context = stream.codec_context
        colour, interlaced = colour_of(context), interlaced_in_headers(stream)
        if colour.problem:
            raise VideoError(colour.problem)
        _check_allowed(colour, interlaced, config)
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
