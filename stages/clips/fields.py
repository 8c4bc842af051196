"""What an entry of a dataset says of its clip: caption and prompt; shared by tars and folders."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stages.clips.prompts import SubjectPrompt

# Legend: H W pixels, N points.


def caption_from_fields(fields: dict[str, Any]) -> str | None:
    """The caption among a record's fields; None when missing or blank.

    Raises:
        ValueError: It is something other than text.
    """
    caption = fields.get("caption")
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise ValueError(f"caption must be text, got {caption!r}")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the caption is not UTF-8") from error
    return caption.strip() or None


def prompt_from_fields(
    fields: Mapping[str, Any], mask_png: bytes | None = None
) -> SubjectPrompt | None:
    """The prompt that a dataset gives: its mask, else its box, else its points, else None.

    Args:
        fields: May hold `box_xyxy` (four numbers), `points` (pairs of numbers) and `point_labels`
            (0 or 1 each; all 1 when left out).
        mask_png: An image of the first frame's size; a pixel above half of full scale (above 0
            in an image that only holds 0 and 1) is on the subject.

    Raises:
        ValueError: What is given is malformed.
    """
    if mask_png is not None:
        return SubjectPrompt(mask_HW=decode_mask(mask_png))
    if fields.get("box_xyxy") is not None:
        box = _numbers(fields["box_xyxy"], "box_xyxy")
        if box.shape != (4,):
            raise ValueError(f"box_xyxy must be four numbers x0 y0 x1 y1, got {fields['box_xyxy']}")
        x0, y0, x1, y1 = box.tolist()
        return SubjectPrompt(box_xyxy=(x0, y0, x1, y1))
    if fields.get("points") is not None:
        points_xy = _numbers(fields["points"], "points")
        labels = fields.get("point_labels")
        if labels is None:
            return SubjectPrompt(points_xy=points_xy, point_labels=np.ones(len(points_xy), int))
        label_numbers = _numbers(labels, "point_labels")
        return SubjectPrompt(points_xy=points_xy, point_labels=label_numbers.astype(np.int64))
    return None


def decode_mask(png: bytes) -> np.ndarray:
    """The bool [H, W] mask in an image file; an alpha channel is ignored.

    Raises:
        ValueError: The bytes are no image that Pillow opens safely.
    """
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            grey_HW = np.asarray(image.convert("RGB").convert("L"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"the mask is no readable PNG: {error}") from error
    return grey_HW > (127 if grey_HW.max(initial=0) > 1 else 0)


def _numbers(value: Any, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, got {value!r}") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {value!r}")
    return numbers
