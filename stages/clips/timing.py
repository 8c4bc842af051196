"""Frame times of a video, and the selection of a clip's frames by them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av

from stages.clips.geometry import Sampling
from stages.clips.records import ClipSkipped
from stages.clips.video.decoding import open_video
from stages.clips.video.streams import VideoSource, lacks_times, open_stream

_RATE_TOLERANCE = Fraction(2, 100)
"""If all intervals are within 2% of the requested one, consecutive frames are taken: sampling them
by time would occasionally repeat one."""

_MAX_DELAY = Fraction(1, 4)
"""Maximum delay of a frame, in intervals of the requested rate, if the frame due has already been
taken: camera frames are some milliseconds early or late."""

_MAX_ROUNDING_S = Fraction(1, 1000)
"""Maximum rounding of times, seconds. Files that round their times have ticks of about a
millisecond or less; coarser ticks are usually the frame interval itself, and times are exact."""

_MAX_TICK_PER_FRAME = Fraction(1, 2)
"""Maximum tick, as a fraction of the frame interval, for times to be treated as rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Presentation times of a video's frames."""

    times: tuple[Fraction, ...]
    """Seconds, as stored in the file; strictly increasing."""
    end: Fraction | None
    """End of the last frame, seconds; None if `times` covers only the start of the video."""
    tick: Fraction
    """Time base of the file, seconds."""
    stated_rates: tuple[Fraction, ...] = ()
    """Frames per second stated by the headers, which may be averages or guesses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameChoice:
    """The frames selected for a clip."""

    indices: tuple[int, ...]
    """Increasing frame indices; fewer than requested if the video is too short."""
    sampling: Sampling
    fps: Fraction
    """Source frames per second between the first and the last of them."""
    held_from: Fraction | None = None
    """If there are too few frames because the video's last frame is held: its time, in seconds
    after the first frame."""


def read_timeline(
    source: VideoSource, *, num_frames: int, seconds: Fraction, limit: int
) -> Timeline | None:
    """Read the frame times of a video from its packets.

    Packets may be undecodable or never shown; only `decode_timeline` is conclusive.

    Args:
        source: The encoded video or its location.
        num_frames: Minimum number of frames to cover, if the video has as many.
        seconds: Minimum time to cover after the first frame, if the video is as long.
        limit: Maximum number of frames to read.

    Returns:
        None if the packets do not determine the times.

    Raises:
        VideoError: As `open_stream`.
    """
    with open_stream(source) as (container, stream, rate):
        tick = Fraction(stream.time_base or 0)
        unordered = lacks_times(container)
        shown: list[tuple[Fraction, Fraction]] = []
        first: Fraction | None = None
        known_until: Fraction | None = None
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                stamp = packet.dts if unordered else packet.pts
                if stamp is None:
                    return None
                shown.append((stamp * tick, (packet.duration or 0) * tick))
                # No frame is shown before it is decoded, so all later packets are shown later.
                known_until = None if packet.dts is None else packet.dts * tick
                if len(shown) > limit:
                    break
                first = shown[-1][0] if first is None else min(first, shown[-1][0])
                if known_until is not None and known_until - first >= seconds:
                    known = [time for time, _ in shown if time <= known_until]
                    if len(known) > num_frames and max(known) - first >= seconds:
                        break
            else:
                known_until = None
        except (av.error.FFmpegError, OSError, MemoryError):
            return None
        return _timeline(shown, known_until, tick, _rates(stream, rate))


def decode_timeline(
    source: VideoSource, *, num_frames: int, seconds: Fraction, limit: int
) -> Timeline:
    """Like `read_timeline`, but from decoded frames.

    Raises:
        VideoError: As `open_video`.
    """
    with open_stream(source) as (_, stream, rate):
        tick, rates = Fraction(stream.time_base or 0), _rates(stream, rate)
    shown: list[tuple[Fraction, Fraction]] = []
    known_until: Fraction | None = None
    with open_video(source) as (_, frames):
        for frame in frames:
            shown.append((frame.time, frame.duration))
            covered = len(shown) > num_frames and frame.time - shown[0][0] >= seconds
            if covered or len(shown) > limit:
                known_until = frame.time
                break
    timeline = _timeline(shown, known_until, tick, rates)
    assert timeline is not None  # `open_video` checks that times increase
    return timeline


def _timeline(
    shown: list[tuple[Fraction, Fraction]],
    known_until: Fraction | None,
    tick: Fraction,
    rates: tuple[Fraction, ...],
) -> Timeline | None:
    """Build a timeline from frame times and durations; None without frames or with equal times.

    Args:
        shown: Time and duration of frames, in any order.
        known_until: Time up to which all frames are included; None if all frames are.
        tick: Time base, seconds.
        rates: Frame rates stated by the headers.
    """
    shown = sorted(shown)
    times = tuple(time for time, _ in shown if known_until is None or time <= known_until)
    if not times or any(after <= before for before, after in pairwise(times)):
        return None
    if known_until is not None:
        return Timeline(times=times, end=None, tick=tick, stated_rates=rates)
    usual = times[-1] - times[-2] if len(times) > 1 else 1 / rates[0]
    return Timeline(
        times=times, end=times[-1] + (shown[-1][1] or usual), tick=tick, stated_rates=rates
    )


def _rates(stream: Any, stated: Fraction) -> tuple[Fraction, ...]:
    others = (stream.guessed_rate, stream.base_rate)
    return (stated, *(Fraction(rate) for rate in others if rate))


def choose_frames(timeline: Timeline, *, num_frames: int, fps: Fraction | None) -> FrameChoice:
    """Select the frames of a clip that starts at the video's first frame.

    If `fps` is None, or every interval among the first `num_frames` frames is within 2% of 1 / fps,
    these frames are taken. Otherwise frame k is the last one shown at or before k / fps; if that
    has already been taken, the next one, provided it is less than 1 / (4 fps) late.

    Times are relative to the first frame. Rounded times are replaced by exact ones if they fit a
    constant rate; otherwise frames count as shown up to half a tick earlier, at most 0.5 ms.

    Args:
        timeline: Must cover the last sampling time and `num_frames` frames, unless the video ends.
        num_frames: Frames of the clip.
        fps: Frames per second of the clip; None takes frames as stored.

    Raises:
        ClipSkipped: fps_too_low, if a frame would be repeated.
    """
    times, end, rounding = _undo_rounding(timeline)
    if fps is None or _is_even(times[:num_frames], 1 / fps, _RATE_TOLERANCE / fps + rounding):
        indices = tuple(range(min(num_frames, len(times))))
        return FrameChoice(
            indices=indices, sampling="consecutive", fps=_mean_rate(times, indices, timeline)
        )
    slack = rounding / 2
    chosen: list[int] = []
    position, held_from = 0, None
    for instant in range(num_frames):
        due = instant / fps
        if end is not None and due + slack >= end:
            break
        while position + 1 < len(times) and times[position + 1] <= due + slack:
            position += 1
        if chosen and position == chosen[-1]:
            if position + 1 == len(times):
                held_from = times[position]
                break
            if times[position + 1] - due >= _MAX_DELAY / fps:
                raise _too_slow(times, position, fps)
            position += 1
        chosen.append(position)
    return FrameChoice(
        indices=tuple(chosen),
        sampling="time",
        fps=_mean_rate(times, chosen, timeline),
        held_from=held_from,
    )


def _undo_rounding(
    timeline: Timeline,
) -> tuple[Sequence[Fraction], Fraction | None, Fraction]:
    """Times and end relative to the first frame, and the maximum rounding error of each."""
    start = timeline.times[0]
    times = [time - start for time in timeline.times]
    end = None if timeline.end is None else timeline.end - start
    if len(times) < 2:
        return times, end, Fraction(0)
    # Some programs round to coarser ticks than the time base of the file.
    tick = _greatest_common_divisor(times)
    rate = _constant_rate(times, tick, timeline.stated_rates)
    if rate is None:
        return times, end, min(tick, _MAX_ROUNDING_S)
    times = [index / rate for index in range(len(times))]
    if end is not None and abs(end - len(times) / rate) <= 2 * max(tick, timeline.tick):
        end = len(times) / rate
    return times, end, Fraction(0)


def _greatest_common_divisor(times: Sequence[Fraction]) -> Fraction:
    denominator = math.lcm(*(time.denominator for time in times))
    return Fraction(math.gcd(*(int(time * denominator) for time in times)), denominator)


def _constant_rate(
    times: Sequence[Fraction], tick: Fraction, stated: Sequence[Fraction]
) -> Fraction | None:
    """The constant frame rate of which `times` are rounded values; None if there is none."""
    if all(time == index * times[1] for index, time in enumerate(times)):
        return 1 / times[1]
    for rate in _likely_rates((len(times) - 1) / times[-1], stated):
        # With ticks as long as frame intervals, a missing frame would look like rounding.
        if tick * rate > _MAX_TICK_PER_FRAME:
            continue
        errors = [time - index / rate for index, time in enumerate(times)]
        # For any rounding mode the errors lie within one tick.
        if max(errors) - min(errors) < tick:
            return rate
    return None


def _likely_rates(measured: Fraction, stated: Sequence[Fraction]) -> list[Fraction]:
    """Candidate rates: common ones first, then those stated by the headers.

    A stated rate is often an average over rounded times and slightly off. Integer rates and those
    divided by 1.001 can both fit a short clip with coarse ticks; the one stated by the headers is
    preferred, otherwise the integer.
    """
    positive = [rate for rate in stated if rate > 0]
    near = (measured, *positive)
    usual = [
        *(Fraction(round(rate)) for rate in near),
        *(Fraction(round(rate * 1001 / 1000) * 1000, 1001) for rate in near),
    ]
    stated_usual = [rate for rate in positive if rate in usual]
    return [rate for rate in dict.fromkeys((*stated_usual, *usual, *positive)) if rate > 0]


def _is_even(times: Sequence[Fraction], interval: Fraction, tolerance: Fraction) -> bool:
    return all(abs(after - before - interval) <= tolerance for before, after in pairwise(times))


def _mean_rate(times: Sequence[Fraction], chosen: Sequence[int], timeline: Timeline) -> Fraction:
    last = chosen[-1] if chosen else 0
    if last:
        return last / times[last]
    return next((rate for rate in timeline.stated_rates if rate > 0), Fraction(0))


def _too_slow(times: Sequence[Fraction], position: int, fps: Fraction) -> ClipSkipped:
    mean = times[-1] / (len(times) - 1)
    if _is_even(times, mean, mean * _RATE_TOLERANCE):
        reason = f"the video has {float(1 / mean):.3f} frames/s, data.fps is {float(fps):g}"
    else:
        start, end = float(times[position]), float(times[position + 1])
        reason = f"no new frame between {start:.3f} s and {end:.3f} s"
    return ClipSkipped("fps_too_low", f"{reason}; frames are never repeated")
