"""Reads the frame times of a video from its packets, or if these are unreliable by decoding."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import av

from stages.clips.decoding import lacks_times, open_stream, open_video
from stages.clips.timing import Timeline
from stages.clips.video_source import VideoSource


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
