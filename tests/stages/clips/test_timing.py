"""Frame selection, against a reference that has the true times."""

import math
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.clips import ClipSkipped, load_clip, probe_clip
from stages.clips.timing import Timeline, choose_frames, decode_timeline, read_timeline

MS = Fraction(1, 1000)


def shown_at(times: list[Fraction], instants: list[Fraction]) -> list[int]:
    """By the definition, with exact times: the last frame at or before each instant."""
    return [sum(time <= instant for time in times) - 1 for instant in instants]


def nearest(number: Fraction) -> int:
    """Halves away from 0, as FFmpeg rounds."""
    return math.floor(number + Fraction(1, 2))


def instants_of(num_frames: int, fps: int | Fraction) -> list[Fraction]:
    return [Fraction(index) / fps for index in range(num_frames)]


def timeline_of(times: list[Fraction], tick: Fraction, **changes) -> Timeline:
    """As a file has it that rounds its times to the nearest tick."""
    rounded = tuple(nearest(time / tick) * tick for time in times)
    stated = Fraction(len(times) - 1) / (rounded[-1] - rounded[0])
    return Timeline(
        **{
            "times": rounded,
            "end": rounded[-1] + (rounded[-1] - rounded[-2]),
            "tick": tick,
            "stated_rates": (stated,),
            **changes,
        }
    )


def chosen(timeline: Timeline, num_frames: int = 9, fps: Fraction | None = Fraction(8)):
    choice = choose_frames(timeline, num_frames=num_frames, fps=fps)
    return list(choice.indices), choice.sampling


@pytest.mark.parametrize("tick", [Fraction(1, 90_000), MS, Fraction(1, 600), Fraction(1, 100)])
@pytest.mark.parametrize(
    "rate", [24, 25, 30, 50, 60, Fraction(24000, 1001), Fraction(30000, 1001), 12, 15, 16]
)
@pytest.mark.parametrize("start", [0, Fraction(1, 3)])
def test_rounding_to_any_tick_does_not_move_a_constant_rate(rate, tick, start):
    true = [index / Fraction(rate) for index in range(500)]
    choice, sampling = chosen(timeline_of([start + time for time in true], tick), 49)
    assert choice == shown_at(true, instants_of(49, 8)) and sampling == "time"


@pytest.mark.parametrize("rate", [24, 25, 30, 60])
def test_ticks_that_are_the_frames_own_intervals_are_exact(rate):
    true = [Fraction(index, rate) for index in range(rate * 8)]
    choice, _ = chosen(timeline_of(true, Fraction(1, rate)), 49)
    assert choice == shown_at(true, instants_of(49, 8))


@settings(max_examples=60)
@given(
    gaps=st.lists(st.integers(1, 120), min_size=60, max_size=90),
    unit=st.sampled_from([MS, Fraction(1, 120), Fraction(1, 30)]),
    start=st.integers(-5000, 5000),
)
def test_uneven_times_are_taken_as_the_file_gives_them(gaps, unit, start):
    if unit != MS:
        gaps = [1 + gap % 3 for gap in gaps]
    relative = [unit * total for total in accumulate(gaps, initial=0)]
    timeline = timeline_of([unit * start + time for time in relative], Fraction(1, 15_360 * 25))
    assert [time - timeline.times[0] for time in timeline.times] == relative
    instants = instants_of(9, 8)
    # Half a millisecond late is due, and where a frame is taken already, a quarter of 1 / fps.
    exact, latest = (
        shown_at(relative, [instant + late for instant in instants])
        for late in (0, Fraction(1, 32))
    )
    try:
        choice, sampling = chosen(timeline)
    except ClipSkipped:
        assert len(set(exact)) < 9
        return
    if len(choice) < 9:
        assert relative[-1] < 1 + Fraction(1, 8)
    elif sampling == "time":
        assert len(set(choice)) == 9 and sorted(choice) == choice
        for index, frame in enumerate(choice):
            due = relative[frame] <= instants[index] + MS / 2
            assert frame in (exact[index], shown_at(relative, [instants[index] + MS / 2])[0]) or (
                not due and exact[index] == choice[index - 1] and frame <= latest[index]
            )


def test_a_rate_that_changes_is_not_taken_for_its_average():
    # 16 frames/s for two seconds, then 3.8/s: 8.01 on average.
    true = [Fraction(index, 16) for index in range(33)]
    true += [2 + index / Fraction(19, 5) for index in range(1, 34)]
    assert abs(65 / true[-1] - 6) < 1
    timeline = timeline_of(true, Fraction(1, 90_000))
    assert chosen(timeline, 17) == ([2 * index for index in range(17)], "time")
    with pytest.raises(ClipSkipped, match=r"no new frame between 2\.000 s and 2\.263 s"):
        chosen(timeline, 25)


def test_a_last_frame_that_is_held_does_not_slow_the_others():
    true = [Fraction(index, 16) for index in range(33)]
    timeline = timeline_of(true, MS, end=Fraction(10), stated_rates=(Fraction(33, 10),))
    assert chosen(timeline, 17) == ([2 * index for index in range(17)], "time")
    held = choose_frames(timeline, num_frames=25, fps=Fraction(8))
    assert len(held.indices) == 17 and held.held_from == 2


def test_consecutive_needs_every_interval():
    even = [Fraction(index, 8) for index in range(12)]
    assert chosen(timeline_of(even, MS)) == (list(range(9)), "consecutive")
    slow = [time * Fraction(8, Fraction(79, 10)) for time in even]  # 7.9 frames/s
    assert chosen(timeline_of(slow, MS))[1] == "consecutive"
    one_off = [time + (Fraction(1, 50) if index >= 5 else 0) for index, time in enumerate(even)]
    assert chosen(timeline_of(one_off, MS)) == (list(range(9)), "time")
    assert chosen(timeline_of(one_off, MS), fps=None) == (list(range(9)), "consecutive")
    # Those beyond the clip do not matter.
    later = [time + (1 if index >= 10 else 0) for index, time in enumerate(even)]
    assert chosen(timeline_of(later, MS)) == (list(range(9)), "consecutive")


def test_frames_a_little_late_are_taken_and_none_twice():
    rng = np.random.default_rng(0)
    true = [Fraction(index, 8) + Fraction(int(rng.integers(-20, 21)), 1000) for index in range(60)]
    true[0] = Fraction(0)
    choice, sampling = chosen(timeline_of(true, MS), 49)
    assert choice == list(range(49)) and sampling == "time"
    missing = true[:20] + true[21:]
    with pytest.raises(ClipSkipped, match="no new frame"):
        chosen(timeline_of(missing, MS), 49)


@pytest.mark.parametrize("rate", [1, 5, 7, Fraction(15, 2)])
def test_a_rate_below_the_asked_one_is_named(rate):
    true = [index / Fraction(rate) for index in range(200)]
    with pytest.raises(ClipSkipped, match=rf"{float(rate):.3f} frames/s, data.fps is 8"):
        chosen(timeline_of(true, MS), 49)


@pytest.mark.parametrize(
    ("container", "tick", "rate"),
    [
        ("mp4", Fraction(1, 100), 30),
        ("mp4", Fraction(1, 90), 24),
        ("mp4", MS, Fraction(24000, 1001)),
        ("matroska", MS, Fraction(24000, 1001)),
        ("matroska", MS, Fraction(30000, 1001)),
    ],
)
@pytest.mark.parametrize("b_frames", [False, True])
def test_files_give_the_frames_of_their_true_times(tools, config, container, tick, rate, b_frames):
    true = [index / Fraction(rate) for index in range(50)]
    video = tools.encode(
        tools.counting_frames(50),
        fps=rate,
        container=container,
        times=[nearest(time / tick) for time in true],
        tick=tick,
        options=tools.B_FRAMES if b_frames else {"bf": "0"},
    )
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == shown_at(true, instants_of(9, 8))
    assert clip.geometry.source_fps == pytest.approx(float(rate), rel=0.01)


def held_to_the_end(tools) -> bytes:
    """16 frames/s, and a last frame 8 seconds later: 3.4 frames/s on average."""
    times = [round(index * 62.5) for index in range(30)] + [10_000]
    return tools.encode(tools.counting_frames(31), fps=16, times=times, options={"bf": "0"})


def test_headers_that_average_do_not_skip_a_clip(tools, config):
    record = tools.record_of(held_to_the_end(tools))
    assert tools.numbers_of(load_clip(record, config()).frames_THWC) == list(range(0, 17, 2))
    assert float(probe_clip(record, config()).fps) < 17
    outcomes = []
    for read in (probe_clip, load_clip):
        with pytest.raises(ClipSkipped, match=r"no new frame between 1\.8") as caught:
            read(record, config(num_frames=17))
        outcomes.append((caught.value.reason, caught.value.detail))
    assert outcomes[0] == outcomes[1] and outcomes[0][0] == "fps_too_low"


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("matroska", "libx264"),
        ("mpegts", "libx264"),
        ("flv", "libx264"),
        ("avi", "libx264"),
        ("avi", "mpeg4"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("mpeg", "mpeg2video"),
    ],
)
def test_packets_tell_the_times_that_decoding_gives(tools, container, codec):
    video = tools.encode(
        tools.counting_frames(40),
        fps=25,
        container=container,
        codec=codec,
        pix_fmt="yuv420p",
        options=tools.B_FRAMES if codec == "libx264" else None,
    )
    asked = {"num_frames": 9, "seconds": Fraction(1), "limit": 1000}
    packets, decoded = (read(video, **asked) for read in (read_timeline, decode_timeline))
    assert packets.times[:20] == decoded.times[:20] and len(packets.times) >= 25
    whole = {"num_frames": 99, "seconds": Fraction(1), "limit": 1000}
    packets, decoded = (read(video, **whole) for read in (read_timeline, decode_timeline))
    assert packets.times == decoded.times and len(packets.times) == 40


def test_packets_that_are_never_shown_do_not_shift_the_frames(tools, config, monkeypatch):
    video = tools.encode(tools.counting_frames(40), fps=24)
    whole = read_timeline(video, num_frames=9, seconds=Fraction(2), limit=1000)
    misleading = (*whole.times[:3], whole.times[3] - MS, *whole.times[3:])
    monkeypatch.setattr(
        "stages.clips.loading.read_timeline",
        lambda *_, **__: Timeline(times=misleading, end=None, tick=whole.tick),
    )
    clip = load_clip(tools.record_of(video), config())
    assert tools.numbers_of(clip.frames_THWC) == [0, 3, 6, 9, 12, 15, 18, 21, 24]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("start", [-500, 0, 100_000])
def test_times_count_from_the_first_frame_that_is_shown(container, start, tools, config):
    times = [start + nearest(Fraction(1000 * index, 24)) for index in range(50)]
    video = tools.encode(
        tools.counting_frames(50),
        fps=24,
        container=container,
        times=times,
        options={"bf": "0"},
    )
    clip = load_clip(tools.record_of(video), config())
    # An mp4's edit list hides what comes before time 0.
    first = sum(time < 0 for time in times) if container == "mp4" else 0
    expected = shown_at([Fraction(index, 24) for index in range(50)], instants_of(9, 8))
    assert tools.numbers_of(clip.frames_THWC) == [first + index for index in expected]


def test_a_pause_in_which_the_clip_would_end_is_named(tools, config):
    times = [*range(0, 1000, 125), *range(3000, 5000, 125)]
    for num_frames in (17, 24):
        video = tools.encode(
            tools.counting_frames(num_frames),
            container="matroska",
            times=times[:num_frames],
            options={"bf": "0"},
        )
        with pytest.raises(ClipSkipped, match=r"no new frame between 0\.875 s and 3\.000 s"):
            load_clip(tools.record_of(video), config())
    only = tools.encode(tools.counting_frames(8), container="matroska", times=times[:8])
    with pytest.raises(ClipSkipped, match="8 frames at 8 frames/s, needs 9"):
        load_clip(tools.record_of(only), config())
