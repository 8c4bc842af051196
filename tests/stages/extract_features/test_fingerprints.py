"""Each kind's fingerprint changes with the inputs of that kind only."""

from dataclasses import replace

import pytest

from stages.clips import BadRecord, ClipRecord, SubjectPrompt
from stages.extract_features.config import GroundingConfig, TeacherConfig
from stages.extract_features.fingerprints import fingerprint_of

BOX, OTHER_BOX = (SubjectPrompt(box_xyxy=(0, 0, 9, side)) for side in (8, 9))
RECORD = ClipRecord(key="a", video=b"", caption="a dog runs", prompts=(BOX,), phrase="a dog")
UNPROMPTED = replace(RECORD, prompts=())
VIDEO, OTHER_VIDEO = "a" * 16, "b" * 16

CHANGES = {
    "caption": {"caption": "a cat runs"},
    "box": {"prompts": (OTHER_BOX,)},
    "box more": {"prompts": (BOX, OTHER_BOX)},
    "phrase": {"phrase": "a cat"},
    "last": {"last_frame_prompts": (BOX,)},
    "key": {"key": "b"},
}
DATASET = TeacherConfig()
CONCERNED = [
    ("text", DATASET, RECORD, {"caption"}),
    ("latents", DATASET, RECORD, set()),
    ("teacher", DATASET, RECORD, {"box", "box more"}),
    ("masks", DATASET, RECORD, {"box", "box more"}),
    ("teacher", DATASET, UNPROMPTED, {"box", "box more"}),
    ("teacher", TeacherConfig(prompts=("automatic",)), RECORD, set()),
    ("teacher", TeacherConfig(prompts=("grounding",)), RECORD, {"phrase"}),
    (
        "teacher",
        TeacherConfig(prompts=("grounding",)),
        replace(RECORD, phrase=None),
        {"caption", "phrase"},
    ),
    ("teacher", TeacherConfig(prompts=("dataset", "grounding")), RECORD, {"box", "box more"}),
    ("teacher", TeacherConfig(prompts=("grounding", "dataset")), RECORD, {"phrase"}),
    (
        "teacher",
        TeacherConfig(prompts=("dataset", "grounding"), prompt_fallback=True),
        RECORD,
        {"box", "box more", "phrase"},
    ),
    (
        "teacher",
        TeacherConfig(prompts=("grounding",), grounding=GroundingConfig(phrase="a horse")),
        RECORD,
        set(),
    ),
    ("teacher", TeacherConfig(backward_prompt="dataset"), RECORD, {"box", "box more", "last"}),
]


@pytest.mark.parametrize(("kind", "teacher", "record", "concerned"), CONCERNED)
def test_it_changes_with_what_the_kind_reads(kind, teacher, record, concerned):
    before = fingerprint_of(record, kind, teacher, VIDEO)
    assert before[16:] == VIDEO
    changed = {
        name
        for name, change in CHANGES.items()
        if fingerprint_of(replace(record, **change), kind, teacher, VIDEO) != before
    }
    assert changed == concerned
    other = fingerprint_of(record, kind, teacher, OTHER_VIDEO)
    assert other[16:] == OTHER_VIDEO
    assert (other[:16] == before[:16]) == (kind == "text")


def test_what_is_wrong_with_a_record_is_its_source():
    bad = BadRecord(key="a", reason="bad_prompt", detail="the mask is empty")
    one = fingerprint_of(bad, "text", DATASET, VIDEO)
    assert one == fingerprint_of(bad, "teacher", DATASET, OTHER_VIDEO)
    assert one != fingerprint_of(replace(bad, detail="no PNG"), "text", DATASET, VIDEO)
    assert one != fingerprint_of(RECORD, "text", DATASET, VIDEO)
