"""Which frames of a video make a clip, from the times at which they are shown; nothing decoded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from stages.clips.geometry import Sampling
from stages.clips.records import ClipSkipped

_RATE_TOLERANCE = Fraction(2, 100)
"""Frames whose intervals are all within 2% of the asked one are taken one after the other: sampling
them by time would now and then show one twice."""

_LATE = Fraction(1, 4)
"""How late a frame may come, in intervals of the asked rate, where the one shown is taken already:
cameras' frames come some milliseconds early or late."""

_MOST_ROUNDING = Fraction(1, 1000)
"""Seconds. Files that round their times have ticks of about a millisecond or less; where ticks are
coarser, they are mostly the frames' own intervals, and times are exact."""


_MOST_OF_A_FRAME = Fraction(1, 2)
"""Of an interval between frames that one tick may be, for times to be taken as rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """When the frames of a video are shown."""

    times: tuple[Fraction, ...]
    """Seconds, as the file gives them; rising."""
    end: Fraction | None
    """When the last frame goes; None where `times` is a video's beginning only."""
    tick: Fraction
    """Seconds in which the file counts."""
    stated_rates: tuple[Fraction, ...] = ()
    """Frames per second that the headers name, which may be averages or guesses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameChoice:
    """The frames of a clip."""

    indices: tuple[int, ...]
    """Rising positions among the video's frames; fewer than asked for where the video ends."""
    sampling: Sampling
    fps: Fraction
    """Frames per second of the source between the first and the last of them."""
    held_from: Fraction | None = None
    """Seconds after the first frame from which the last frame of the video stands still, where that
    is why there are fewer."""


def choose_frames(timeline: Timeline, *, num_frames: int, fps: Fraction | None) -> FrameChoice:
    """The frames of a clip that starts with the video's first frame.

    Where `fps` is None, or every interval among the first `num_frames` frames is within 2% of
    1 / fps, they are those. Otherwise frame k is the last one shown at or before k / fps; where
    that one is taken already, the next one, if it comes less than 1 / (4 fps) later.

    Times count from the first frame. Those that a file rounds are undone where they fit a constant
    rate; others count as due half a tick early, 0.5 ms at most.

    Args:
        timeline: Up to the last instant, and at least `num_frames` frames, unless the video ends.
        num_frames: Of the clip.
        fps: Of the clip; None takes frames as stored.

    Raises:
        ClipSkipped: fps_too_low, where a frame would be repeated.
    """
    times, end, rounding = _unrounded(timeline)
    if fps is None or _is_even(times[:num_frames], 1 / fps, _RATE_TOLERANCE / fps + rounding):
        indices = tuple(range(min(num_frames, len(times))))
        return FrameChoice(
            indices=indices, sampling="consecutive", fps=_mean_rate(times, indices, timeline)
        )
    slack = rounding / 2
    chosen: list[int] = []
    here, held_from = 0, None
    for instant in range(num_frames):
        due = instant / fps
        if end is not None and due + slack >= end:
            break
        while here + 1 < len(times) and times[here + 1] <= due + slack:
            here += 1
        if chosen and here == chosen[-1]:
            if here + 1 == len(times):
                held_from = times[here]
                break
            if times[here + 1] - due >= _LATE / fps:
                raise _too_slow(times, here, fps)
            here += 1
        chosen.append(here)
    return FrameChoice(
        indices=tuple(chosen),
        sampling="time",
        fps=_mean_rate(times, chosen, timeline),
        held_from=held_from,
    )


def _unrounded(
    timeline: Timeline,
) -> tuple[Sequence[Fraction], Fraction | None, Fraction]:
    """Times and end, from the first frame on, and by how much the file may have rounded each."""
    start = timeline.times[0]
    times = [time - start for time in timeline.times]
    end = None if timeline.end is None else timeline.end - start
    if len(times) < 2:
        return times, end, Fraction(0)
    # Programs round to coarser ticks than the file's own.
    tick = _greatest_common_divisor(times)
    rate = _constant_rate(times, tick, timeline.stated_rates)
    if rate is None:
        return times, end, min(tick, _MOST_ROUNDING)
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
    """The frames per second of which `times` are the rounded instants; None where there is none."""
    if all(time == index * times[1] for index, time in enumerate(times)):
        return 1 / times[1]
    for rate in _likely_rates((len(times) - 1) / times[-1], stated):
        # Where ticks are as long as frames, a frame that is missing looks like rounding.
        if tick * rate > _MOST_OF_A_FRAME:
            continue
        errors = [time - index / rate for index, time in enumerate(times)]
        # However a program rounds, the errors lie within one tick.
        if max(errors) - min(errors) < tick:
            return rate
    return None


def _likely_rates(measured: Fraction, stated: Sequence[Fraction]) -> list[Fraction]:
    """Rates that are usual, then those stated.

    A stated one is often an average over rounded times, and off by a little. Whole rates and those
    over 1.001 can both fit a short clip with coarse ticks; the headers decide, else the whole one.
    """
    given = [rate for rate in stated if rate > 0]
    near = (measured, *given)
    usual = [
        *(Fraction(round(rate)) for rate in near),
        *(Fraction(round(rate * 1001 / 1000) * 1000, 1001) for rate in near),
    ]
    named = [rate for rate in given if rate in usual]
    return [rate for rate in dict.fromkeys((*named, *usual, *given)) if rate > 0]


def _is_even(times: Sequence[Fraction], interval: Fraction, tolerance: Fraction) -> bool:
    return all(abs(after - before - interval) <= tolerance for before, after in pairwise(times))


def _mean_rate(times: Sequence[Fraction], chosen: Sequence[int], timeline: Timeline) -> Fraction:
    last = chosen[-1] if chosen else 0
    if last:
        return last / times[last]
    return next((rate for rate in timeline.stated_rates if rate > 0), Fraction(0))


def _too_slow(times: Sequence[Fraction], here: int, fps: Fraction) -> ClipSkipped:
    mean = times[-1] / (len(times) - 1)
    if _is_even(times, mean, mean * _RATE_TOLERANCE):
        why = f"the video has {float(1 / mean):.3f} frames/s, {float(fps):g} were asked for"
    else:
        why = f"no new frame between {float(times[here]):.3f} s and {float(times[here + 1]):.3f} s"
    return ClipSkipped("fps_too_low", f"{why}; frames are never repeated")
