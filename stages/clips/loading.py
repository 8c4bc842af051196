"""A record of the dataset to a clip at the training size; used by stage one."""

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
    """Decode a clip's frames at the asked rate, length and size, from the video's first frame on.

    Frames: see `timing.choose_frames`; never the same source frame twice. Pixels: upright, whole
    (interlaced ones deinterlaced), standard range (HDR and wide gamut converted). Size: see
    `geometry.cover_and_crop`. Subjects that the crop cut away are dropped; `Clip.prompt_problem`
    says so when none of frame 0's is left.

    Raises:
        ClipSkipped: undecodable, too_short, fps_too_low, or, where the settings ask for it, hdr or
            interlaced.
    """
    try:
        for read in (read_timeline, decode_timeline):
            planned = plan_clip(record, config, read)
            clip = planned and _load(record, config, *planned)
            if clip:
                return clip
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error
    raise ClipSkipped("undecodable", "its frames come out at other times when decoded again")


def plan_clip(
    record: ClipRecord, config: ClipsConfig, read: TimelineReader
) -> tuple[Timeline, FrameChoice] | None:
    """When a video's frames are shown, and which of them make the clip, as many as asked for.

    Args:
        record: The clip.
        config: Its length and rate.
        read: `read_timeline` or `decode_timeline`.

    Returns:
        None where the former does not tell.

    Raises:
        ClipSkipped: too_short or fps_too_low.
        VideoError: What `read` raises; also a clip beyond `MAX_DECODED_FRAMES`.
    """
    fps = rate_of(config)
    seconds = Fraction(0) if fps is None else config.num_frames / fps
    timeline = read(
        record.video, num_frames=config.num_frames, seconds=seconds, limit=MAX_DECODED_FRAMES
    )
    if timeline is None:
        return None
    choice = choose_frames(timeline, num_frames=config.num_frames, fps=fps)
    complete = len(choice.indices) == config.num_frames
    if (not complete and timeline.end is None) or choice.indices[-1] >= MAX_DECODED_FRAMES:
        raise VideoError(f"of its first {MAX_DECODED_FRAMES:,} frames no clip can be made")
    if not complete:
        raise too_short(record, choice, config)
    return timeline, choice


def rate_of(config: ClipsConfig) -> Fraction | None:
    """Frames per second that were asked for; None for frames as stored."""
    return None if config.fps is None else Fraction(config.fps).limit_denominator(1001)


def _load(
    record: ClipRecord, config: ClipsConfig, timeline: Timeline, choice: FrameChoice
) -> Clip | None:
    """The clip; None where decoding gives other frames than the timeline has."""
    geometry: FrameGeometry | None = None
    images_HWC: list[np.ndarray] = []
    conversions: dict[str, None] = {}
    wanted = set(choice.indices)
    with open_video(record.video) as (info, frames):
        for index, frame in enumerate(islice(frames, choice.indices[-1] + 1)):
            if index >= len(timeline.times) or frame.time != timeline.times[index]:
                return None
            _refuse_unwanted(frame, config)
            if index not in wanted:
                continue
            image_HWC = frame.image()
            geometry = geometry or _geometry(image_HWC, info, config, choice)
            images_HWC.append(geometry.frame(image_HWC))
            conversions |= dict.fromkeys(frame.conversions)
    if geometry is None or len(images_HWC) < config.num_frames:
        return None
    stream = () if info.stream is None else (info.stream,)
    prompts, problem = _on_training_frame(record.prompts, geometry)
    try:
        last_frame_prompts = _placed(record.last_frame_prompts, geometry)
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


def _refuse_unwanted(frame: Frame, config: ClipsConfig) -> None:
    if config.hdr == "skip" and frame.colour.hdr:
        raise hdr_unwanted(frame.colour.hdr)
    if config.interlaced == "skip" and frame.interlaced:
        raise interlaced_unwanted()


def hdr_unwanted(transfer: str) -> ClipSkipped:
    """The outcome of an HDR clip where the settings ask to skip it."""
    return ClipSkipped("hdr", f"its frames are HDR ({transfer}), and data.hdr is skip")


def interlaced_unwanted() -> ClipSkipped:
    """The outcome of an interlaced clip where the settings ask to skip it."""
    return ClipSkipped("interlaced", "its frames are interlaced, and data.interlaced is skip")


def _on_training_frame(
    prompts: Sequence[SubjectPrompt], geometry: FrameGeometry
) -> tuple[tuple[SubjectPrompt, ...], str | None]:
    """What the crop leaves of the prompts, and why nothing is left of any."""
    try:
        left = _placed(prompts, geometry)
    except ValueError as error:
        return (), str(error)
    if left or not prompts:
        return left, None
    kinds = ", ".join(prompt.kind for prompt in prompts)
    return (), f"the subject ({kinds}) lies outside the centre crop, or vanishes at its size"


def _placed(prompts: Sequence[SubjectPrompt], geometry: FrameGeometry) -> tuple[SubjectPrompt, ...]:
    """Those of the prompts of which the crop leaves something.

    Raises:
        ValueError: One of them was made on a video of another size.
    """
    placed = [prompt.on_training_frame(geometry) for prompt in prompts]
    return tuple(prompt for prompt in placed if prompt is not None)


def too_short(record: ClipRecord, choice: FrameChoice, config: ClipsConfig) -> ClipSkipped:
    """The outcome of a clip that gives fewer frames than asked for, or than its headers promise."""
    rate = "" if config.fps is None else f" at {config.fps:g} frames/s"
    detail = f"{len(choice.indices)} frames{rate}, needs {config.num_frames}"
    if choice.held_from is not None:
        detail += f"; its last frame stands still from {float(choice.held_from):.3f} s on"
    with open_stream(record.video) as (_, stream, _):
        promised = stream.frames
    if choice.sampling == "consecutive" and promised >= config.num_frames:
        detail += f"; the file promises {promised}, so it is cut off or damaged"
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
