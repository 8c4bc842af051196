"""Notes on skipped clips."""

from cache_schema import SkippedClip
from pipeline.commands.skipped_notes import skipped_notes


def clip(key, reason="too_short", detail="3 frames"):
    return SkippedClip(key=key, reason=reason, detail=detail, fingerprint="0" * 32, shard="00000")


def test_what_several_kinds_say_of_a_clip_is_one_line():
    notes = skipped_notes(
        [
            ("teacher", clip("a")),
            ("teacher", clip("b", "no_prompt", "none")),
            ("masks", clip("a")),
            ("text", clip("a", "no_caption", "none")),
        ],
        "would skip",
    )
    assert notes == [
        "teacher, masks would skip a: too_short (3 frames)",
        "teacher would skip b: no_prompt (none)",
        "text would skip a: no_caption (none)",
    ]


def test_many_are_counted():
    notes = skipped_notes(("text", clip(f"{number:02d}")) for number in range(25))
    assert len(notes) == 21
    assert notes[19].startswith("text skipped 19:")
    assert notes[20] == "… and 5 more; --json lists them"
