"""Decodes the clip of a dataset record at the training size, length and frame rate."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice

import numpy as np

from stages.clips.config import ClipsConfig
from stages.clips.decoding import Frame, VideoError, VideoInfo, open_stream, open_video
from stages.clips.geometry import FrameGeometry, cover_and_crop
from stages.clips.limits import MAX_DECODED_FRAMES
from stages.clips.prompts import SubjectPrompt
from stages.clips.records import Clip, ClipRecord, ClipSkipped
from stages.clips.timeline import decode_timeline, read_timeline
from stages.clips.timing import FrameChoice, Timeline, choose_frames

TimelineReader = Callable[..., Timeline | None]
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
            planned = plan_clip(record, config, read)
            clip = planned and _load(record, config, *planned)
            if clip:
                return clip
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error
    raise ClipSkipped("undecodable", "its frame times differ when it is decoded again")


def plan_clip(
    record: ClipRecord, config: ClipsConfig, read: TimelineReader
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
        raise too_short(record, choice, config)
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
            _check_allowed(frame, config)
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


def _check_allowed(frame: Frame, config: ClipsConfig) -> None:
    if config.hdr == "skip" and frame.colour.hdr:
        raise hdr_skipped(frame.colour.hdr)
    if config.interlaced == "skip" and frame.interlaced:
        raise interlaced_skipped()


def hdr_skipped(transfer: str) -> ClipSkipped:
    """The outcome of an HDR clip if the settings exclude HDR."""
    return ClipSkipped("hdr", f"its frames are HDR ({transfer}), and data.hdr is skip")


def interlaced_skipped() -> ClipSkipped:
    """The outcome of an interlaced clip if the settings exclude interlaced video."""
    return ClipSkipped("interlaced", "its frames are interlaced, and data.interlaced is skip")


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


def too_short(record: ClipRecord, choice: FrameChoice, config: ClipsConfig) -> ClipSkipped:
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
        orientation=info.orientation,
        source_fps=float(choice.fps),
        sampling=choice.sampling,
    )
