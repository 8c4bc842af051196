import io

import numpy as np
import pytest
from PIL import Image

from stages.clips import SubjectPrompt
from stages.clips.fields import caption_from_fields, decode_mask, prompt_from_fields


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


def test_a_mask_outranks_a_box_and_a_box_points():
    fields = {"box_xyxy": [1, 2, 3, 4], "points": [[5, 6]]}
    assert prompt_from_fields(fields, png(np.eye(4, dtype=np.uint8) * 255)).kind == "mask"
    assert prompt_from_fields(fields).box_xyxy == (1.0, 2.0, 3.0, 4.0)
    points = prompt_from_fields({"points": [[5, 6], [7, 8]]})
    assert points.kind == "points" and points.point_labels.tolist() == [1, 1]
    assert prompt_from_fields({}) is None


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
        {"points": [[1, 2]], "point_labels": [1, 0]},
        {"points": [[1, 2]], "point_labels": [0]},
        {"points": [[1, 2]], "point_labels": [2]},
        {"points": [[1, 2]], "point_labels": [0.5]},
    ],
)
def test_malformed_prompts_are_refused(fields):
    with pytest.raises(ValueError):
        prompt_from_fields(fields)


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


def test_a_prompt_is_exactly_one_thing():
    with pytest.raises(ValueError, match="none"):
        SubjectPrompt()
    with pytest.raises(ValueError, match="box"):
        SubjectPrompt(mask_HW=np.ones((2, 2), bool), box_xyxy=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="empty"):
        SubjectPrompt(mask_HW=np.zeros((2, 2), bool))


def test_captions_are_stripped_and_checked():
    assert caption_from_fields({"caption": " a dog \n"}) == "a dog"
    assert caption_from_fields({"caption": "  "}) is None
    assert caption_from_fields({}) is None
    for bad in (3, ["a"], "\ud800"):
        with pytest.raises(ValueError, match="caption"):
            caption_from_fields({"caption": bad})
