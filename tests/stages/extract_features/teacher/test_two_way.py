"""Tracking passes and validity of frames, with a stub tracker whose scores the test sets."""

# Legend: T frame, H W mask or grid, C channel.

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stages.clips import ClipSkipped
from stages.config import FeatureKind
from stages.extract_features.teacher.two_way import Subject, SubjectTrack, SubjectTracker
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import (
    EmptyMaskError,
    TrackedFrame,
    TrackRequest,
)

CPU = torch.device("cpu")
NUM_FRAMES = 7
Sees = Callable[[str, int], bool]


def prompt_named(name: str) -> Sam2Prompt:
    """Prompts carry no name of their own; the fake tracker reads it from the labels' bytes."""
    return Sam2Prompt(point_labels_1P=torch.tensor([list(name.encode())]))


def name_of(prompt: Sam2Prompt) -> str:
    assert prompt.point_labels_1P is not None
    return bytes(prompt.point_labels_1P[0].tolist()).decode()


class ScriptedTracker:
    """Sees a subject where `sees(prompt's name, frame)` says so.

    Its mask is column `frame` alone; a prompt made from it is named after it. Features hold the
    frame's index, negative on a track that visits frames backward.
    """

    model = SimpleNamespace(device=CPU)

    def __init__(self, sees: Sees, vanishing: Sequence[int] = ()) -> None:
        self.sees = sees
        self.vanishing = vanishing
        """Frames whose masks are gone at SAM2's size."""
        self.runs: list[list[tuple[str, list[int]]]] = []
        """Prompt and order of every pass, those side by side in one list."""
        self.features: list[tuple[str, ...]] = []

    def track(
        self, requests: Sequence[TrackRequest], *, features: Sequence[FeatureKind]
    ) -> Iterator[tuple[TrackedFrame, ...]]:
        assert len({len(request.order) for request in requests}) == 1
        self.runs.append([(name_of(r.prompt), list(r.order)) for r in requests])
        self.features.append(tuple(features))
        for step in range(len(requests[0].order)):
            yield tuple(self._frame(request, step, features) for request in requests)

    def _frame(
        self, request: TrackRequest, step: int, features: Sequence[FeatureKind]
    ) -> TrackedFrame:
        index = request.order[step]
        sign = 1 if request.order[1] > request.order[0] else -1
        visible = self.sees(name_of(request.prompt), index)
        logits_HW = torch.full((2, NUM_FRAMES), -1024.0)
        if visible:
            logits_HW[:, index] = 5.0
        return TrackedFrame(
            index=index,
            features={name: torch.full((3, 2, 2), sign * (index + 1.0)) for name in features},
            mask_logits_HW=logits_HW,
            object_score=torch.tensor(2.0 if visible else -2.0),
        )

    def prompt_from_logits(self, mask_logits_HW: torch.Tensor) -> Sam2Prompt:
        columns = (mask_logits_HW > 0).any(dim=0).nonzero().flatten().tolist()
        if columns[0] in self.vanishing:
            raise EmptyMaskError("empty")
        return prompt_named(f"mask{columns[0]}")


def subject(name: str = "given", frame: int = 0, last: str | None = None) -> Subject:
    return Subject(
        encoded=SimpleNamespace(num_frames=NUM_FRAMES),  # type: ignore[arg-type]
        frame=frame,
        prompt=prompt_named(name),
        last_prompt=None if last is None else prompt_named(last),
    )


def follow(
    tracker: Any, *subjects: Subject, both_ways: bool = True, passes_at_once: int = 1
) -> list[SubjectTrack | ClipSkipped]:
    return SubjectTracker(
        tracker=tracker,
        both_ways=both_ways,
        features="memory_attention",
        feature_grid=None,
        passes_at_once=passes_at_once,
        keep_on=CPU,
    ).track(subjects)


def only(outcomes: list[SubjectTrack | ClipSkipped]) -> SubjectTrack:
    (track,) = outcomes
    assert isinstance(track, SubjectTrack)
    return track


def test_a_subject_that_stays_is_tracked_through_the_clip_and_back_from_its_last_mask() -> None:
    tracker = ScriptedTracker(lambda name, t: True)
    track = only(follow(tracker, subject()))
    everywhere = list(range(NUM_FRAMES))
    assert tracker.runs == [[("given", everywhere)], [("mask6", everywhere[::-1])]]
    assert (track.first_frame, track.last_frame, track.backward_prompt) == (0, 6, "track")
    assert track.usable_T.all() and track.visited_T.all()
    assert track.cycle_consistency == 1.0
    assert track.backward is not None
    for direction, sign in ((track.forward, 1), (track.backward, -1)):
        assert direction.features_THWC is not None
        expected = sign * np.arange(1, NUM_FRAMES + 1)[:, None, None, None] * np.ones((1, 2, 2, 3))
        np.testing.assert_array_equal(direction.features_THWC.numpy(), expected)


def test_the_backward_pass_starts_from_the_last_frame_that_shows_the_subject() -> None:
    # Lost on frame 2, back on 3 and 4, lost for good after that.
    tracker = ScriptedTracker(lambda name, t: t in (0, 1, 3, 4))
    track = only(follow(tracker, subject()))
    assert tracker.runs[1] == [("mask4", [4, 3, 2, 1, 0])]
    assert track.last_frame == 4
    assert track.usable_T.tolist() == [True, True, False, True, True, False, False]
    assert track.visited_T.tolist() == [True] * 5 + [False] * 2
    assert track.backward is not None and track.backward.features_THWC is not None
    assert not track.backward.features_THWC[5:].any()


def test_a_mask_that_vanishes_at_full_size_prompts_nothing() -> None:
    tracker = ScriptedTracker(lambda name, t: t <= 4, vanishing=[3, 4])
    track = only(follow(tracker, subject()))
    assert tracker.runs[1] == [("mask2", [2, 1, 0])]
    assert track.last_frame == 2
    (outcome,) = follow(ScriptedTracker(lambda name, t: t <= 4, vanishing=range(7)), subject())
    assert isinstance(outcome, ClipSkipped)
    assert outcome.reason == "subject_lost"
    assert "left at full size" in outcome.detail

    sought = ScriptedTracker(lambda name, t: 1 <= t <= 4, vanishing=[1])
    track = only(follow(sought, subject(frame=3)))
    assert [runs[0] for runs in sought.runs[:2]] == [
        ("given", [3, 2, 1, 0]),
        ("mask2", [2, 3, 4, 5, 6]),
    ]
    assert track.first_frame == 2


def test_a_frame_counts_only_where_both_directions_see_the_subject() -> None:
    tracker = ScriptedTracker(lambda name, t: t != (5 if name == "given" else 2))
    track = only(follow(tracker, subject()))
    assert [t for t in range(NUM_FRAMES) if track.usable_T[t]] == [0, 1, 3, 4, 6]
    assert track.cycle_consistency == 1.0  # over the frames that both see


def test_an_empty_mask_with_a_positive_score_is_not_seen() -> None:
    tracker = ScriptedTracker(lambda name, t: True)
    frame = tracker._frame

    def empty_on_3(
        request: TrackRequest, step: int, features: Sequence[FeatureKind]
    ) -> TrackedFrame:
        made = frame(request, step, features)
        if made.index == 3:
            made.mask_logits_HW.fill_(-0.5)
        return made

    tracker._frame = empty_on_3  # type: ignore[method-assign]
    assert only(follow(tracker, subject())).usable_T.tolist() == [True] * 3 + [False] + [True] * 3


def test_a_prompt_on_a_later_frame_is_followed_back_to_the_earliest_frame_first() -> None:
    tracker = ScriptedTracker(lambda name, t: t >= 2)
    track = only(follow(tracker, subject(frame=4)))
    assert tracker.runs == [
        [("given", [4, 3, 2, 1, 0])],
        [("mask2", [2, 3, 4, 5, 6])],
        [("mask6", [6, 5, 4, 3, 2])],
    ]
    assert tracker.features == [(), ("memory_attention",), ("memory_attention",)]
    assert track.first_frame == 2
    assert track.usable_T.tolist() == [False] * 2 + [True] * 5


def test_a_later_prompt_that_finds_nothing_earlier_starts_the_forward_pass_itself() -> None:
    tracker = ScriptedTracker(lambda name, t: t >= 4)
    assert only(follow(tracker, subject(frame=4))).first_frame == 4
    assert tracker.runs[1] == [("given", [4, 5, 6])]


def test_the_datasets_last_frame_prompt_starts_the_backward_pass_at_the_end() -> None:
    # The forward track loses the subject; the backward one, from its own prompt, does not.
    tracker = ScriptedTracker(lambda name, t: name == "last" or t < 4)
    track = only(follow(tracker, subject(last="last"), passes_at_once=2))
    everywhere = list(range(NUM_FRAMES))
    assert tracker.runs == [[("given", everywhere), ("last", everywhere[::-1])]]
    assert (track.last_frame, track.backward_prompt) == (3, "dataset")
    assert track.visited_T.all()
    assert track.usable_T.tolist() == [True] * 4 + [False] * 3


def test_one_way_there_is_no_backward_pass() -> None:
    tracker = ScriptedTracker(lambda name, t: t < 5)
    track = only(follow(tracker, subject(last="last"), both_ways=False))
    assert len(tracker.runs) == 1 and track.backward is None
    assert track.backward_prompt is None and track.cycle_consistency is None
    assert track.usable_T.tolist() == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    ("frame", "seen_on", "detail"),
    [
        (0, (), "the forward track, from frame 0, sees it nowhere"),
        (0, (0,), "loses it after frame 0"),
        (3, (), "from frame 3 back to frame 0 sees it nowhere"),
        (6, (6,), "frame 6, the clip's last, is the only one"),
    ],
)
def test_a_subject_that_is_lost_at_once_is_an_outcome_and_says_where(
    frame: int, seen_on: tuple[int, ...], detail: str
) -> None:
    tracker = ScriptedTracker(lambda name, t: t in seen_on)
    (outcome,) = follow(tracker, subject(frame=frame))
    assert isinstance(outcome, ClipSkipped)
    assert outcome.reason == "subject_lost" and detail in outcome.detail


def test_passes_of_equal_length_run_side_by_side_and_a_lost_subject_disturbs_none() -> None:
    def sees(name: str, t: int) -> bool:
        return {"a": True, "b": False, "c": t < 4, "d": True}.get(name, True)

    names = ("a", "b", "c", "d")
    together = ScriptedTracker(sees)
    outcomes = follow(together, *(subject(name) for name in names), passes_at_once=3)
    assert [[name for name, _ in run] for run in together.runs] == [
        ["a", "b", "c"],
        ["d"],
        ["mask6", "mask6"],
        ["mask3"],
    ]
    for name, outcome in zip(names, outcomes, strict=True):
        (alone,) = follow(ScriptedTracker(sees), subject(name))
        if isinstance(alone, ClipSkipped):
            assert name == "b" and isinstance(outcome, ClipSkipped)
            assert outcome.detail == alone.detail
            continue
        assert isinstance(outcome, SubjectTrack)
        assert outcome.last_frame == alone.last_frame
        for one, other in zip(outcome.directions, alone.directions, strict=True):
            assert one.features_THWC is not None and other.features_THWC is not None
            torch.testing.assert_close(one.features_THWC, other.features_THWC, rtol=0, atol=0)
            torch.testing.assert_close(one.logits_THW, other.logits_THW, rtol=0, atol=0)


def test_one_pass_at_a_time_puts_none_side_by_side() -> None:
    tracker = ScriptedTracker(lambda name, t: True)
    follow(tracker, subject("a"), subject("b", last="last"))
    assert [len(run) for run in tracker.runs] == [1] * 4
