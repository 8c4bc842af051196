"""Several subjects in a clip, prompts on other frames, and subjects that are lost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stages.clips import (
    Clip,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    SubjectPrompt,
)
from stages.extract_features.extraction import Outcome
from stages.extract_features.prompts import ChosenPrompt, PromptChooser
from stages.sam2_tracking.tracker import Tracker
from tests.stages.extract_features.teacher.conftest import entry, skipped
from tests.stages.extract_features.teacher.grid_reference import (
    gram_flow,
    on_grid,
)


def test_a_mask_that_vanishes_at_sam2s_size_is_skipped(
    make_record: Callable[..., ClipRecord],
    extract: Callable[..., list[Outcome]],
    record: ClipRecord,
    clips: ClipsConfig,
) -> None:
    dot_HW = np.zeros((clips.height, clips.width), dtype=bool)
    dot_HW[10, 10] = True
    dotted = make_record(SubjectPrompt(mask_HW=dot_HW))
    outcomes = extract(dotted, record, image_size=64)
    assert skipped(outcomes[0]).reason == "bad_prompt"
    assert entry(outcomes[1]).arrays["valid"].all()  # the other clip of the batch is not disturbed


@pytest.mark.parametrize("time_rate", ["frame", "latent"])
def test_frames_after_the_subject_is_lost_are_invalid_and_hold_zeros(
    time_rate: str,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    lose_subject(lambda frame, _: frame == 2 or frame > 6)
    (outcome,) = extract(record, time_rate=time_rate)
    valid = [1, 1, 0, 1, 1, 1, 1, 0, 0]
    visited = [True] * 7 + [False] * 2
    attributes = entry(outcome).attributes
    assert (attributes["first_frame"], attributes["last_frame"]) == (0, 6)
    assert (attributes["lost_at"], attributes["valid_frames"]) == (7, 6)
    masks = entry(outcome, "masks").arrays
    assert masks["valid"].tolist() == valid
    assert not masks["forward"][[2, 7, 8]].any() and not masks["backward"][7:].any()
    teacher = entry(outcome).arrays
    if time_rate == "latent":  # frame 0; 1 to 4; 5 to 8
        valid, visited = [1, 0, 0], [True, True, False]
    assert teacher["valid"].tolist() == valid
    norms_THW = np.linalg.norm(teacher["features"], axis=-1)
    expected_THW = np.asarray(visited)[:, None, None] * np.ones(norms_THW.shape)
    np.testing.assert_allclose(norms_THW, expected_THW, atol=1e-5)


@pytest.mark.parametrize("fusion", ["gram_flow", "forward"])
def test_a_clip_without_two_neighbouring_valid_frames_is_skipped_and_says_where(
    fusion: str,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    lose_subject(lambda frame, _: frame not in (0, 3))
    outcome = skipped(extract(record, fusion=fusion)[0])
    assert outcome.reason == "subject_lost"
    assert "2 of 9 frames, no two of them neighbours" in outcome.detail
    assert "last on frame 3" in outcome.detail


def test_a_clip_whose_directions_disagree_is_skipped_when_that_is_asked(
    record: ClipRecord, extract: Callable[..., list[Outcome]]
) -> None:
    (kept,) = extract(record)
    consistency = entry(kept).attributes["quality"]
    assert isinstance(consistency, float) and 0 < consistency < 1
    (just_kept,) = extract(record, min_cycle_consistency=consistency)
    assert not isinstance(just_kept, ClipSkipped)
    outcome = skipped(extract(record, min_cycle_consistency=min(1.0, consistency + 1e-3))[0])
    assert outcome.reason == "inconsistent" and f"{consistency:.3f}" in outcome.detail


def test_each_subject_is_tracked_by_itself_and_averaged_in_gram_flow_space(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
) -> None:
    (outcome,) = extract(make_record(*subjects), subjects="each", max_subjects=3)
    alone = [entry(extract(make_record(subject))[0]) for subject in subjects]
    together = entry(outcome)
    width = alone[0].arrays["features"].shape[-1]
    assert together.arrays["features"].shape[-1] == 3 * width
    assert not together.arrays["features"][..., 2 * width :].any()
    flows = [gram_flow(one.arrays["features"].astype(np.float64)) for one in alone]
    assert np.abs(flows[0] - flows[1]).max() > 1e-3
    got = gram_flow(together.arrays["features"].astype(np.float64))
    np.testing.assert_allclose(got, (flows[0] + flows[1]) / 2, atol=5e-6)
    consistencies: list[Any] = [one.attributes["quality"] for one in alone]
    assert together.attributes["quality"] == pytest.approx(np.mean(consistencies))
    prompt = together.attributes["prompt"]
    assert isinstance(prompt, dict)
    assert (prompt["subjects"], prompt["kinds"]) == (2, ["mask", "box"])


def test_masks_of_each_subject_are_joined(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
) -> None:
    (outcome,) = extract(make_record(*subjects), subjects="each", kinds=("masks",))
    alone = [
        entry(extract(make_record(subject), kinds=("masks",))[0], "masks") for subject in subjects
    ]
    for name in ("forward", "backward"):
        likeliest = np.maximum(*(one.arrays[name] for one in alone)).astype(int)
        got = entry(outcome, "masks").arrays[name].astype(int)
        # Equal but where both subjects reach into one mask pixel.
        assert (got >= likeliest - 1).all() and (np.abs(got - likeliest) <= 1).mean() > 0.9


def test_more_subjects_than_there_is_room_for_are_skipped(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
) -> None:
    outcome = skipped(extract(make_record(*subjects), subjects="each", max_subjects=1)[0])
    assert outcome.reason == "too_many_subjects" and outcome.detail.startswith("2 subjects")


def test_a_lost_subject_among_several_is_named(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    steps = iter(range(1000))
    lose_subject(lambda *_: next(steps) >= 9)  # the second forward track is the second pass
    outcome = skipped(extract(make_record(*subjects), subjects="each")[0])
    assert outcome.reason == "subject_lost"
    assert outcome.detail == "subject 2 of 2: the forward track, from frame 0, sees it nowhere"


def test_the_union_of_masks_is_tracked_as_one_mask(
    make_record: Callable[..., ClipRecord],
    mask_HW: np.ndarray,
    extract: Callable[..., list[Outcome]],
) -> None:
    left_HW, right_HW = mask_HW.copy(), mask_HW.copy()
    middle = int(np.nonzero(mask_HW.any(axis=0))[0].mean())
    left_HW[:, middle:], right_HW[:, :middle] = False, False
    halves = make_record(SubjectPrompt(mask_HW=left_HW), SubjectPrompt(mask_HW=right_HW))
    whole = make_record(SubjectPrompt(mask_HW=mask_HW))
    joined, single = (entry(extract(record)[0]) for record in (halves, whole))
    # The halves meet in a mask of a quarter of SAM2's resolution: one pixel off in places.
    got, expected = (
        gram_flow(one.arrays["features"].astype(np.float64)) for one in (joined, single)
    )
    assert np.abs(got - expected).mean() < 0.01
    prompt = joined.attributes["prompt"]
    assert isinstance(prompt, dict) and prompt["subjects"] == 2


def test_the_datasets_prompt_for_the_last_frame_starts_the_backward_track(
    make_record: Callable[..., ClipRecord],
    decoded_THWC: np.ndarray,
    mask_HW: np.ndarray,
    subject_mask: Callable[..., np.ndarray],
    clips: ClipsConfig,
    extract: Callable[..., list[Outcome]],
    stock: Callable[..., Any],
) -> None:
    last_HW = subject_mask(clips.height, clips.width, shift=0.01 * (clips.num_frames - 1))
    record = make_record(SubjectPrompt(mask_HW=mask_HW), last=[SubjectPrompt(mask_HW=last_HW)])
    (outcome,) = extract(record, backward_prompt="dataset")
    backward = stock(decoded_THWC[::-1], lambda p, state: p.add_new_mask(state, 0, 1, last_HW))
    raw_TCHW = np.stack([backward.attended[t].numpy() for t in sorted(backward.attended)])[::-1]
    direction = on_grid(raw_TCHW, *clips.token_grid)
    features = entry(outcome).arrays["features"]
    got = features[..., features.shape[-1] // 2 :].astype(np.float64)
    np.testing.assert_allclose(gram_flow(got), gram_flow(direction), atol=5e-6)
    prompt = entry(outcome).attributes["prompt"]
    assert isinstance(prompt, dict) and prompt["backward"] == "dataset"


def test_a_prompt_on_a_later_frame_is_tracked_both_ways_from_there(
    make_record: Callable[..., ClipRecord],
    subject_mask: Callable[..., np.ndarray],
    clips: ClipsConfig,
    extract: Callable[..., list[Outcome]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SubjectPrompt(mask_HW=subject_mask(clips.height, clips.width, shift=0.04))

    def choose(_: PromptChooser, clip: Clip, tracker: Tracker, encoded: object) -> ChosenPrompt:
        return ChosenPrompt(
            source="grounding", frame=4, subjects=(there,), confidence=0.6, detail={"phrase": "it"}
        ).converted(clip, tracker)

    monkeypatch.setattr(PromptChooser, "choose", choose)
    (outcome,) = extract(make_record(there))
    stored = entry(outcome)
    assert stored.arrays["valid"].all() and stored.attributes["first_frame"] == 0
    assert stored.attributes["prompt"] == {
        "source": "grounding",
        "kinds": ["mask"],
        "frame": 4,
        "subjects": 1,
        "confidence": 0.6,
        "phrase": "it",
        "backward": "track",
    }
