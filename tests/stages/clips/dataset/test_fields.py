import io

import numpy as np
import pytest
from PIL import Image

from stages.clips import SubjectPrompt
from stages.clips.dataset.fields import (
    last_frame_from_fields,
    subjects_from_fields,
    text_from_fields,
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
    assert kinds(subjects_from_fields(fields, mask_pngs={0: mask})) == ["mask"]
    named = fields | {"mask": "m.png"}
    assert kinds(subjects_from_fields(named, read_mask=lambda name: mask)) == ["mask"]
    assert kinds(subjects_from_fields(named)) == ["box"]  # masks lie beside: the name means nothing
    assert subjects_from_fields(fields)[0].box_xyxy == (1.0, 2.0, 3.0, 4.0)
    (points,) = subjects_from_fields({"points": [[5, 6], [7, 8]]})
    assert points.kind == "points" and points.point_labels.tolist() == [1, 1]
    assert subjects_from_fields({}) == subjects_from_fields({"box_xyxy": None}) == ()


def test_several_subjects_are_told_apart():
    masks = {"a": png(np.eye(4, dtype=np.uint8)), "b": png(1 - np.eye(4, dtype=np.uint8))}
    fields = {"subjects": [{"mask": "b"}, {"box_xyxy": [0, 0, 2, 2]}, {"points": [[5, 6]]}]}
    prompts = subjects_from_fields(fields, read_mask=masks.__getitem__)
    assert kinds(prompts) == ["mask", "box", "points"]
    assert np.array_equal(prompts[0].mask_HW, ~np.eye(4, dtype=bool))
    beside = subjects_from_fields(
        {"box_xyxy": [0, 0, 2, 2]}, mask_pngs=dict(enumerate(masks.values()))
    )
    assert kinds(beside) == ["mask", "mask"] and beside[0].mask_HW[0, 0]
    assert subjects_from_fields({"subjects": []}) == ()


def test_the_last_frame_has_its_own_subjects():
    mask = png(np.eye(4, dtype=np.uint8))
    box = {"box_xyxy": [0, 0, 2, 2]}
    fields = {"points": [[1, 1]], "last_frame": box}
    assert kinds(last_frame_from_fields(fields)) == ["box"]
    assert kinds(last_frame_from_fields(fields, mask_pngs={0: mask})) == ["mask"]
    assert kinds(last_frame_from_fields({"last_frame": {"subjects": [box, box]}})) == ["box"] * 2
    assert last_frame_from_fields(box) == last_frame_from_fields({"last_frame": {}}) == ()
    for bad in ([1], {"box_xyxy": [3]}):
        with pytest.raises(ValueError, match="last_frame"):
            last_frame_from_fields({"last_frame": bad})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"subjects": [{"points": [[5, 6]]}], "box_xyxy": [0, 0, 9, 9]}, "both given"),
        ({"subjects": [{"points": [[5, 6]]}], "mask": "m.png"}, "both given"),
        ({"subjects": {"points": [[5, 6]]}}, "list of objects"),
        ({"subjects": ["a dog"]}, "list of objects"),
        ({"subjects": [{"points": [[5, 6]]}, {}]}, "subject 1 has none of mask, box_xyxy, points"),
        ({"subjects": [{"points": [[5, 6]]}] * 65}, "the limit is 64"),
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


def test_subjects_of_a_mask_are_chosen_by_their_values():
    mask = np.zeros((9, 9), np.uint8)
    mask[:3], mask[3:6] = 1, 2
    read = {"m.png": png(mask)}.__getitem__

    def rows(prompts: tuple[SubjectPrompt, ...]) -> list[list[int]]:
        masks_HW = [prompt.mask_HW for prompt in prompts if prompt.mask_HW is not None]
        assert len(masks_HW) == len(prompts)
        return [np.flatnonzero(mask_HW.all(axis=1)).tolist() for mask_HW in masks_HW]

    first = {"mask": "m.png", "mask_ids": 2}
    assert rows(subjects_from_fields(first, read_mask=read)) == [[3, 4, 5]]
    both = {"mask": "m.png", "mask_ids": [1, 2]}
    assert rows(subjects_from_fields(both, read_mask=read)) == [[0, 1, 2, 3, 4, 5]]
    beside = subjects_from_fields({"mask_ids": [1]}, mask_pngs={0: png(mask)})
    assert rows(beside) == [[0, 1, 2]]
    each = {"subjects": [{"mask": "m.png", "mask_ids": number} for number in (2, 1)]}
    assert rows(subjects_from_fields(each, read_mask=read)) == [[3, 4, 5], [0, 1, 2]]
    # The subject is the same on the last frame, unless that says otherwise.
    last = first | {"last_frame": {"mask": "m.png"}}
    assert rows(last_frame_from_fields(last, read_mask=read)) == [[3, 4, 5]]
    assert rows(last_frame_from_fields(first, mask_pngs={0: png(mask)})) == [[3, 4, 5]]
    other = first | {"last_frame": {"mask": "m.png", "mask_ids": 1}}
    assert rows(last_frame_from_fields(other, read_mask=read)) == [[0, 1, 2]]
    assert last_frame_from_fields(first | {"last_frame": {"points": [[5, 6]]}})[0].kind == "points"
    with pytest.raises(ValueError, match="the values 0, 1, 2, not only black and white"):
        subjects_from_fields({"mask": "m.png"}, read_mask=read)
    for bad in ([], "1", 1.5, True, [-1], [True], {"a": 1}):
        with pytest.raises(ValueError, match="mask_ids must be integers"):
            subjects_from_fields({"mask": "m.png", "mask_ids": bad}, read_mask=read)
    with pytest.raises(ValueError, match="given without a mask"):
        subjects_from_fields({"mask_ids": [1], "box_xyxy": [1, 2, 30, 40]}, read_mask=read)


NORMALISED = [
    {"box_xyxy": [0.1, 0.2, 0.6, 0.8]},
    {"box_xyxy": [0, 0, 1, 1]},
    {"box_xyxy": [-0.02, 0.1, 1.04, 0.9]},
    {"points": [[0.5, 0.5]]},
    {"points": [[0.5, 0.5], [0.1, 0.9]], "point_labels": [1, 0]},
    {"points": [[1, 1]]},
]


@pytest.mark.parametrize("fields", NORMALISED)
def test_shares_of_the_frame_are_refused(fields):
    for given in (fields, {"subjects": [{"box_xyxy": [5, 6, 70, 80]}, fields]}):
        with pytest.raises(
            ValueError, match="within a pixel of the corner; coordinates must be pixels"
        ):
            subjects_from_fields(given)
        with pytest.raises(ValueError, match=r"last_frame: .* coordinates must be pixels"):
            last_frame_from_fields({"last_frame": given})


@pytest.mark.parametrize(
    "fields", [{"box_xyxy": [0.5, 0.5, 2, 3]}, {"points": [[0.5, 0.5], [20, 0.2]]}]
)
def test_small_coordinates_in_pixels_are_taken(fields):
    assert len(subjects_from_fields(fields)) == 1


def test_the_last_frames_subjects_are_the_firsts_by_number():
    boxes = [{"box_xyxy": [0, 0, size, size]} for size in (10, 20, 30)]
    first = subjects_from_fields({"subjects": boxes})
    for count, numbers in ((3, [0, 1, 2]), (2, [None, None])):
        fields = {"last_frame": {"subjects": boxes[:count]}}
        last = last_frame_from_fields(fields, first=first)
        assert [prompt.number for prompt in last] == numbers
    one = last_frame_from_fields({"last_frame": boxes[0]}, first=first[2:])
    assert [prompt.number for prompt in one] == [2]


def test_a_prompt_is_exactly_one_thing():
    with pytest.raises(ValueError, match="none"):
        SubjectPrompt()
    with pytest.raises(ValueError, match="box"):
        SubjectPrompt(mask_HW=np.ones((2, 2), bool), box_xyxy=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="empty"):
        SubjectPrompt(mask_HW=np.zeros((2, 2), bool))


@pytest.mark.parametrize("name", ["caption", "subject"])
def test_words_are_stripped_and_checked(name):
    assert text_from_fields({name: " a dog \n"}, name) == "a dog"
    assert text_from_fields({name: "  "}, name) is None
    assert text_from_fields({}, name) is None
    for bad in (3, ["a"], "\ud800"):
        with pytest.raises(ValueError, match=name):
            text_from_fields({name: bad}, name)
