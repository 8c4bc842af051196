import io

import numpy as np
import pytest
from PIL import Image

from stages.clips import SubjectPrompt
from stages.clips.fields import (
    caption_from_fields,
    decode_mask,
    last_frame_from_fields,
    phrase_from_fields,
    subjects_from_fields,
)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


def kinds(prompts: tuple[SubjectPrompt, ...]) -> list[str]:
    return [prompt.kind for prompt in prompts]


def test_a_mask_outranks_a_box_and_a_box_points():
    fields = {"box_xyxy": [1, 2, 3, 4], "points": [[5, 6]]}
    mask = png(np.eye(4, dtype=np.uint8) * 255)
    assert kinds(subjects_from_fields(fields, mask_pngs=[mask])) == ["mask"]
    named = fields | {"mask": "m.png"}
    assert kinds(subjects_from_fields(named, read_mask=lambda name: mask)) == ["mask"]
    assert kinds(subjects_from_fields(named)) == ["box"]  # masks lie beside: the name means nothing
    assert subjects_from_fields(fields)[0].box_xyxy == (1.0, 2.0, 3.0, 4.0)
    (points,) = subjects_from_fields({"points": [[5, 6], [7, 8]]})
    assert points.kind == "points" and points.point_labels.tolist() == [1, 1]
    assert subjects_from_fields({}) == subjects_from_fields({"box_xyxy": None}) == ()


def test_several_subjects_are_told_apart():
    masks = {"a": png(np.eye(4, dtype=np.uint8)), "b": png(1 - np.eye(4, dtype=np.uint8))}
    fields = {"subjects": [{"mask": "b"}, {"box_xyxy": [0, 0, 2, 2]}, {"points": [[1, 1]]}]}
    prompts = subjects_from_fields(fields, read_mask=masks.__getitem__)
    assert kinds(prompts) == ["mask", "box", "points"]
    assert np.array_equal(prompts[0].mask_HW, ~np.eye(4, dtype=bool))
    beside = subjects_from_fields({"box_xyxy": [0, 0, 2, 2]}, mask_pngs=list(masks.values()))
    assert kinds(beside) == ["mask", "mask"] and beside[0].mask_HW[0, 0]
    assert subjects_from_fields({"subjects": []}) == ()


def test_the_last_frame_has_its_own_subjects():
    mask = png(np.eye(4, dtype=np.uint8))
    box = {"box_xyxy": [0, 0, 2, 2]}
    fields = {"points": [[1, 1]], "last_frame": box}
    assert kinds(last_frame_from_fields(fields)) == ["box"]
    assert kinds(last_frame_from_fields(fields, mask_pngs=[mask])) == ["mask"]
    assert kinds(last_frame_from_fields({"last_frame": {"subjects": [box, box]}})) == ["box"] * 2
    assert last_frame_from_fields(box) == last_frame_from_fields({"last_frame": {}}) == ()
    for bad in ([1], {"box_xyxy": [3]}):
        with pytest.raises(ValueError, match="last_frame"):
            last_frame_from_fields({"last_frame": bad})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"subjects": [{"points": [[1, 1]]}], "box_xyxy": [0, 0, 1, 1]}, "both given"),
        ({"subjects": [{"points": [[1, 1]]}], "mask": "m.png"}, "both given"),
        ({"subjects": {"points": [[1, 1]]}}, "list of objects"),
        ({"subjects": ["a dog"]}, "list of objects"),
        ({"subjects": [{"points": [[1, 1]]}, {}]}, "subject 1 has none of mask, box_xyxy, points"),
        ({"subjects": [{"points": [[1, 1]]}] * 65}, "at most 64"),
    ],
)
def test_malformed_lists_of_subjects_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        subjects_from_fields(fields, read_mask=lambda name: b"")


@pytest.mark.parametrize(
    "fields",
    [
        {"box_xyxy": [1, 2, 3]},
        {"box_xyxy": [3, 2, 1, 4]},
        {"box_xyxy": [1, 2, float("nan"), 4]},
        {"box_xyxy": [1, 2, float("inf"), 4]},
        {"box_xyxy": "left"},
        {"box_xyxy": {"x": 1}},
        {"box_xyxy": [[1, 2], [3]]},
        {"points": []},
        {"points": [[1, 2, 3]]},
        {"points": [1, 2]},
        {"points": 3},
        {"points": [[1, 10**400]]},
        {"points": [[1, 2], [3, 4]], "point_labels": [1, 1.5]},
        {"points": [[1, 2]], "point_labels": [1, 0]},
        {"points": [[1, 2]], "point_labels": [0]},
        {"points": [[1, 2]], "point_labels": [2]},
        {"points": [[1, 2]], "point_labels": [0.5]},
    ],
)
def test_malformed_prompts_are_refused(fields):
    with pytest.raises(ValueError):
        subjects_from_fields(fields)


@pytest.mark.parametrize(
    "image",
    [
        np.array([[0, 255], [0, 0]], np.uint8),
        np.array([[0, 1], [0, 0]], np.uint8),
        np.array([[False, True], [False, False]]),
        np.repeat(np.array([[0, 200], [0, 20]], np.uint8)[..., None], 3, axis=2),
        np.array([[[9, 9, 9, 0], [255, 255, 255, 0]], [[0, 0, 0, 255]] * 2], np.uint8),
    ],
    ids=["grey", "indices", "1 bit", "RGB", "RGBA"],
)
def test_masks_of_every_mode_read_alike(image):
    assert decode_mask(png(image)).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("content", [b"", b"no picture", png(np.eye(4, dtype=np.uint8))[:-30]])
def test_unreadable_masks_are_refused(content):
    with pytest.raises(ValueError, match="PNG"):
        decode_mask(content)


def test_a_giant_mask_is_refused_before_it_is_decoded():
    giant = Image.new("1", (20_000, 4_000))
    out = io.BytesIO()
    giant.save(out, format="PNG")
    assert len(out.getvalue()) < 50_000
    with pytest.raises(ValueError, match="20000x4000"):
        decode_mask(out.getvalue())


def test_a_prompt_is_exactly_one_thing():
    with pytest.raises(ValueError, match="none"):
        SubjectPrompt()
    with pytest.raises(ValueError, match="box"):
        SubjectPrompt(mask_HW=np.ones((2, 2), bool), box_xyxy=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="empty"):
        SubjectPrompt(mask_HW=np.zeros((2, 2), bool))


@pytest.mark.parametrize(
    ("read", "name"), [(caption_from_fields, "caption"), (phrase_from_fields, "subject")]
)
def test_words_are_stripped_and_checked(read, name):
    assert read({name: " a dog \n"}) == "a dog"
    assert read({name: "  "}) is None
    assert read({}) is None
    for bad in (3, ["a"], "\ud800"):
        with pytest.raises(ValueError, match=name):
            read({name: bad})
