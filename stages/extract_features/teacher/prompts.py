"""Conversion of a clip's chosen prompt to the subjects to track."""

from stages.clips import Clip, ClipSkipped
from stages.extract_features.config import TeacherConfig
from stages.extract_features.prompts import ChosenPrompt, convert_prompt
from stages.extract_features.teacher.two_way import Subject
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import EmptyMaskError, Tracker


def subjects_to_track(
    clip: Clip,
    chosen: ChosenPrompt,
    *,
    config: TeacherConfig,
    tracker: Tracker,
    encoded: EncodedFrames,
) -> tuple[Subject, ...]:
    """Return one subject for the union of all prompts, or one per prompt.

    With `backward_prompt=dataset`, the dataset's prompts for the last frame are used if the clip
    has any. Several subjects are matched with them by `SubjectPrompt.number`, which requires that
    the first frame's prompts are the dataset's too; a subject without a match uses the mask of its
    forward track.

    Raises:
        ClipSkipped: too_many_subjects; or bad_prompt, if SAM2 returns an empty mask.
    """
    if config.subjects == "each" and len(chosen.subjects) > config.max_subjects:
        raise too_many_subjects(len(chosen.subjects), config)
    first = list(chosen.sam2_prompts)
    last = _last_prompts(clip, tracker) if config.backward_prompt == "dataset" else []
    matched: list[Sam2Prompt | None]
    if config.subjects == "union":
        first = [_union(first, chosen.frame, tracker, encoded)]
        everything = [prompt for _, prompt in last]
        union = _union(everything, encoded.num_frames - 1, tracker, encoded) if last else None
        matched = [union]
    elif chosen.source == "dataset":
        by_number = dict(last)
        matched = [
            None if subject.number is None else by_number.get(subject.number)
            for subject in chosen.subjects
        ]
    else:
        is_one = len(first) == len(last) == 1
        matched = [last[0][1]] if is_one else [None] * len(first)
    return tuple(
        Subject(encoded=encoded, frame=chosen.frame, prompt=prompt, last_prompt=last_prompt)
        for prompt, last_prompt in zip(first, matched, strict=True)
    )


def too_many_subjects(count: int, config: TeacherConfig) -> ClipSkipped:
    """Return the outcome of a clip with more than `max_subjects` subjects."""
    detail = f"{count} subjects, extract.teacher.max_subjects is {config.max_subjects}"
    return ClipSkipped("too_many_subjects", detail)


def _last_prompts(clip: Clip, tracker: Tracker) -> list[tuple[int | None, Sam2Prompt]]:
    """Return the dataset's last-frame prompts, by subject, that are not empty at SAM2's size."""
    kept = []
    for subject in clip.last_frame_prompts:
        try:
            kept.append((subject.number, convert_prompt(subject, clip, tracker)))
        except ClipSkipped:  # ignored, as loading ignores prompts outside the crop
            continue
    return kept


def _union(
    prompts: list[Sam2Prompt], frame: int, tracker: Tracker, encoded: EncodedFrames
) -> Sam2Prompt:
    """Return a single prompt unchanged; several as the union of their decoded masks."""
    if len(prompts) == 1:
        return prompts[0]
    logits_NHW = tracker.masks_on_frame(encoded, frame, prompts)
    try:
        return tracker.prompt_from_logits(logits_NHW.amax(dim=0))
    except EmptyMaskError as error:
        raise ClipSkipped(
            "bad_prompt", f"SAM2 sees none of the {len(prompts)} subjects on frame {frame}"
        ) from error
