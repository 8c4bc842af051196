"""Matching of last-frame prompts to subjects."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from stages.clips import Clip, SubjectPrompt
from stages.clips.geometry import cover_and_crop
from stages.extract_features.config import TeacherConfig
from stages.extract_features.prompts import ChosenPrompt
from stages.extract_features.teacher.prompts import subjects_to_track

GEOMETRY = cover_and_crop(32, 48, height=32, width=48, source_fps=8, sampling="consecutive")


def box(size: float, number: int | None) -> SubjectPrompt:
    return SubjectPrompt(box_xyxy=(0.0, 0.0, size, size), number=number)


def matched(
    first: list[SubjectPrompt], last: list[SubjectPrompt], source: str
) -> list[float | None]:
    """The size of the box on the last frame that goes with each subject."""
    clip = Clip(
        key="a",
        frames_THWC=np.zeros((9, 32, 48, 3), np.uint8),
        geometry=GEOMETRY,
        prompts=tuple(first),
        last_frame_prompts=tuple(last),
    )
    model = SimpleNamespace(image_size=48, device=torch.device("cpu"))
    tracker = cast(Any, SimpleNamespace(model=model))
    chosen = ChosenPrompt(source=cast(Any, source), subjects=tuple(first))
    found = subjects_to_track(
        clip,
        chosen.converted(clip, tracker),
        config=TeacherConfig(subjects="each", backward_prompt="dataset"),
        tracker=tracker,
        encoded=cast(Any, None),
    )
    return [
        None
        if subject.last_prompt is None or subject.last_prompt.points_1P2 is None
        else float(subject.last_prompt.points_1P2[0, 1, 0])
        for subject in found
    ]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ([0, 1], [0, 1], [10, 11]),
        ([0, 1], [1, 0], [10, 11]),
        ([0, 1], [1], [None, 11]),
        # The crop took subject 0 on the first frame, and subject 1 on the last.
        ([1], [0], [None]),
        ([0, 1], [None, None], [None, None]),
        ([2], [2], [12]),
    ],
)
def test_subjects_are_matched_by_number(first, last, expected):
    subjects = [box(20, number) for number in first]
    ends = [box(10 + (number or 0), number) for number in last]
    assert matched(subjects, ends, "dataset") == expected


def test_one_subject_found_elsewhere_takes_the_only_one_of_the_last_frame():
    assert matched([box(20, None)], [box(10, 0)], "automatic") == [10]
    assert matched([box(20, None)], [box(10, 0), box(11, 1)], "automatic") == [None]
