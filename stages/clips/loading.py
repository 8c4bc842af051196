"""A record of the dataset to a clip at the training size; used by stage one."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from stages.clips.config import ClipsConfig
from stages.clips.geometry import FrameGeometry, Sampling, cover_and_crop
from stages.clips.limits import MAX_DECODED_FRAMES
from stages.clips.prompts import SubjectPrompt
from stages.clips.records import Clip, ClipRecord, ClipSkipped
from stages.clips.video import Frame, VideoError, VideoInfo, open_video

_RATE_TOLERANCE = Fraction(2, 100)
"""A source within 2% of the asked rate is taken frame by frame: sampling it by time would now and
then show one frame twice."""


def load_clip(record: ClipRecord, config: ClipsConfig) -> Clip:
    """Decode the first `config.num_frames` frames of a clip at the asked rate and size.

    Frames: the one shown at each instant k / fps after the first frame; consecutive frames where
    the source's rate is within 2% of the asked one or `config.fps` is null. Never the same source
    frame twice. Size: see `geometry.cover_and_crop`. Subjects that the crop cut away are dropped;
    `Clip.prompt_problem` says so when none of frame 0's is left.

    Raises:
        ClipSkipped: undecodable, too_short, or fps_too_low.
    """
    try:
        with open_video(record.video) as (info, frames):
            return _load(record, config, info, frames)
    except VideoError as error:
        raise ClipSkipped("undecodable", str(error)) from error


def _load(
    record: ClipRecord, config: ClipsConfig, info: VideoInfo, frames: Iterator[Frame]
) -> Clip:
    sampling = sampling_of(info.fps, config)
    frames = _bounded(frames)
    chosen = (
        frames
        if config.fps is None or sampling == "consecutive"
        else _shown_at(frames, Fraction(config.fps).limit_denominator(1001), info)
    )
    geometry: FrameGeometry | None = None
    images_HWC: list[np.ndarray] = []
    for frame in chosen:
        if geometry is None:
            geometry = _geometry(frame, info, config, sampling)
        images_HWC.append(geometry.frame(frame.image_HWC))
        if len(images_HWC) == config.num_frames:
            break
    if geometry is None or len(images_HWC) < config.num_frames:
        promised = info.stated_frames if sampling == "consecutive" else 0
        raise too_short(len(images_HWC), config, promised=promised)
    prompts, problem = _on_training_frame(record.prompts, geometry)
    return Clip(
        key=record.key,
        frames_THWC=np.stack(images_HWC),
        geometry=geometry,
        caption=record.caption,
        prompts=prompts,
        last_frame_prompts=_on_training_frame(record.last_frame_prompts, geometry)[0],
        phrase=record.phrase,
        prompt_problem=problem,
    )


def _on_training_frame(
    prompts: Sequence[SubjectPrompt], geometry: FrameGeometry
) -> tuple[tuple[SubjectPrompt, ...], str | None]:
    """What the crop leaves of the prompts, and why nothing is left of any."""
    try:
        placed = [prompt.on_training_frame(geometry) for prompt in prompts]
    except ValueError as error:
        return (), str(error)
    left = tuple(prompt for prompt in placed if prompt is not None)
    if left or not prompts:
        return left, None
    kinds = ", ".join(prompt.kind for prompt in prompts)
    return (), f"the subject ({kinds}) lies outside the centre crop, or vanishes at its size"


def sampling_of(source_fps: Fraction, config: ClipsConfig) -> Sampling:
    """How frames are taken from a source of this rate.

    Raises:
        ClipSkipped: fps_too_low.
    """
    if config.fps is None:
        return "consecutive"
    ratio = source_fps / Fraction(config.fps)
    if ratio < 1 - _RATE_TOLERANCE:
        raise ClipSkipped(
            "fps_too_low",
            f"the video has {float(source_fps):.3f} frames/s, {config.fps:g} were asked for; "
            f"frames are never repeated",
        )
    return "consecutive" if ratio <= 1 + _RATE_TOLERANCE else "time"


def too_short(num_frames: int, config: ClipsConfig, *, promised: int = 0) -> ClipSkipped:
    """The outcome of a clip that gives fewer frames than asked for, or than its headers promise."""
    rate = "" if config.fps is None else f" at {config.fps:g} frames/s"
    detail = f"{num_frames} frames{rate}, needs {config.num_frames}"
    if promised >= config.num_frames:
        detail += f"; the file promises {promised}, so it is cut off or damaged"
    return ClipSkipped("too_short", detail)


def _bounded(frames: Iterator[Frame]) -> Iterator[Frame]:
    for number, frame in enumerate(frames):
        if number == MAX_DECODED_FRAMES:
            raise VideoError(
                f"{MAX_DECODED_FRAMES:,} frames were decoded and the clip is not complete"
            )
        yield frame


def _geometry(
    frame: Frame, info: VideoInfo, config: ClipsConfig, sampling: Sampling
) -> FrameGeometry:
    source_height, source_width, _ = frame.image_HWC.shape
    return cover_and_crop(
        source_height,
        source_width,
        height=config.height,
        width=config.width,
        pixel_aspect=info.pixel_aspect,
        rotation=info.rotation,
        source_fps=float(info.fps),
        sampling=sampling,
    )


def _shown_at(frames: Iterator[Frame], fps: Fraction, info: VideoInfo) -> Iterator[Frame]:
    """The frame shown at each instant k / fps; ends where the video does.

    Raises:
        ClipSkipped: fps_too_low, where the source pauses so long that a frame would be repeated.
    """
    # Times in a file are rounded to its tick; a frame due at the instant itself must count.
    slack = min(info.time_tick, 1 / (4 * info.fps))
    shown = next(frames)
    start, instant, fresh = shown.time, 0, True
    for upcoming in frames:
        while upcoming.time > start + Fraction(instant) / fps + slack:
            if not fresh:
                raise ClipSkipped(
                    "fps_too_low",
                    f"no new frame between {float(shown.time - start):.3f} s and "
                    f"{float(upcoming.time - start):.3f} s; frames are never repeated",
                )
            yield shown
            fresh, instant = False, instant + 1
        shown, fresh = upcoming, True
    shown_until = shown.time + 1 / info.fps
    if fresh and start + Fraction(instant) / fps + slack < shown_until:
        yield shown
