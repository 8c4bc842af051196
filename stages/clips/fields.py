"""Parsing of a clip's fields: caption, subject phrase and subject prompts."""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic_core import from_json

from stages.clips.limits import MAX_POINTS, MAX_SUBJECTS, MAX_TEXT_BYTES
from stages.clips.masks import decode_mask
from stages.clips.prompts import SubjectPrompt

# Legend: H W pixels, N points.

MaskReader = Callable[[object], bytes]
"""Reads the PNG named by a `mask` field; ValueError if it is unreadable."""

_PROMPT_FIELDS = ("mask", "box_xyxy", "points")

KNOWN_FIELDS = (
    *("caption", "subject", "subjects", "last_frame"),
    *(*_PROMPT_FIELDS, "mask_ids", "point_labels"),
)
"""Fields that are read; others are ignored."""

_CAPTION_ALIASES = ("text", "prompt")
"""Fields used for the caption if there is no field `caption`."""


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: The content is not a JSON object, or has a duplicate field.
    """
    try:
        text = content.removeprefix(codecs.BOM_UTF8)
        fields = _parse_fast(text)
        # Each field has a colon: if there are no more colons than fields, none is a duplicate.
        if not isinstance(fields, dict) or text.count(b":") != len(fields):
            fields = _STRICT_DECODER.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object: {_truncated(fields)}")
    return fields


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {_truncated(duplicate)} is given twice")
    return fields


_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicates)
"""Ten times slower than pydantic_core, but also accepts deeper nesting and lone surrogates."""


def _parse_fast(content: bytes) -> Any:
    """Parse JSON, keeping the last of duplicate fields; None if the strict decoder must decide."""
    try:
        return from_json(content, cache_strings="keys")
    except ValueError:
        return None


def name_of_caption(fields: Collection[str]) -> str:
    """Name of the caption field: caption, else text or prompt.

    Raises:
        ValueError: There are both text and prompt, but no caption.
    """
    aliases = [name for name in _CAPTION_ALIASES if name in fields]
    if "caption" in fields or not aliases:
        return "caption"
    if len(aliases) > 1:
        raise ValueError(f"no caption, but {' and '.join(aliases)}; rename one of them to caption")
    return aliases[0]


def caption_from_fields(fields: Mapping[str, Any], name: str = "caption") -> str | None:
    """The caption; None if it is missing or blank.

    Args:
        fields: Fields of the record.
        name: Name of the caption field.

    Raises:
        ValueError: It is not a string, or longer than MAX_TEXT_BYTES.
    """
    return _text(fields, name)


def phrase_from_fields(fields: Mapping[str, Any]) -> str | None:
    """The phrase that describes the subject (`subject`); None if it is missing or blank.

    Raises:
        ValueError: It is not a string, or longer than MAX_TEXT_BYTES.
    """
    return _text(fields, "subject")


def subjects_from_fields(
    fields: Mapping[str, Any],
    *,
    mask_pngs: Mapping[int, bytes] | None = None,
    read_mask: MaskReader | None = None,
) -> tuple[SubjectPrompt, ...]:
    """Parse the subject prompts of one frame; () if there are none.

    Args:
        fields: Fields of one subject (`mask`, else `box_xyxy`, else `points` + `point_labels`), or
            `subjects`, a list of objects with these fields. `mask_ids` are the mask values that
            belong to the subject.
        mask_pngs: Masks from separate files, by subject number; they take precedence over a box
            and points.
        read_mask: Reads the file named by `mask`; None to ignore `mask`, when masks come as
            `mask_pngs`.

    Raises:
        ValueError: A prompt is malformed, ambiguous or unreadable, or there are more than
            MAX_SUBJECTS.
    """
    mask_pngs = mask_pngs or {}
    names = _PROMPT_FIELDS if read_mask else _PROMPT_FIELDS[1:]
    listed = fields.get("subjects")
    ids = _mask_ids(fields)
    if listed is None:
        _check_count(len(mask_pngs))
        if mask_pngs:
            return tuple(
                SubjectPrompt(mask_HW=decode_mask(png, ids), number=number)
                for number, png in mask_pngs.items()
            )
        prompt = _prompt(fields, read_mask, ids)
        if ids is not None and (prompt is None or prompt.kind != "mask"):
            raise ValueError("mask_ids are given without a mask")
        return () if prompt is None else (prompt,)
    conflicting = [name for name in names if fields.get(name) is not None]
    if conflicting or mask_pngs:
        found = ", ".join(conflicting) or "mask images"
        raise ValueError(f"subjects and {found} are both given; list every subject in subjects")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ValueError(f"subjects must be a list of objects, got {_truncated(listed)}")
    _check_count(len(listed))
    prompts = []
    for number, entry in enumerate(listed):
        prompt = _prompt(entry, read_mask, _mask_ids(entry, ids), number)
        if prompt is None:
            raise ValueError(f"subject {number} has none of {', '.join(names)}")
        prompts.append(prompt)
    return tuple(prompts)


def last_frame_from_fields(
    fields: Mapping[str, Any],
    *,
    first: Sequence[SubjectPrompt] = (),
    mask_pngs: Mapping[int, bytes] | None = None,
    read_mask: MaskReader | None = None,
) -> tuple[SubjectPrompt, ...]:
    """Parse the subject prompts of the last training frame, from the object `last_frame`.

    It inherits `mask_ids` of the first frame unless it has its own. Subjects of separate mask files
    are matched to the first frame by number, those of a list by position if both frames have
    equally many.

    Args:
        fields: As in `subjects_from_fields`.
        first: Prompts of the first frame.
        mask_pngs: As in `subjects_from_fields`.
        read_mask: As in `subjects_from_fields`.

    Raises:
        ValueError: As `subjects_from_fields`.
    """
    last_frame = fields.get("last_frame")
    if last_frame is not None and not isinstance(last_frame, dict):
        raise ValueError(f"last_frame must be an object, got {_truncated(last_frame)}")
    last_fields = dict(last_frame or {})
    has_mask = mask_pngs or (read_mask and last_fields.get("mask") is not None)
    if (has_mask or last_fields.get("subjects")) and fields.get("mask_ids") is not None:
        last_fields.setdefault("mask_ids", fields["mask_ids"])
    try:
        last = subjects_from_fields(last_fields, mask_pngs=mask_pngs, read_mask=read_mask)
    except ValueError as error:
        raise ValueError(f"last_frame: {error}") from error
    if len(first) == len(last) == 1:
        return (replace(last[0], number=first[0].number),)
    if not mask_pngs and len(first) != len(last):
        return tuple(replace(prompt, number=None) for prompt in last)
    return last


def _prompt(
    fields: Mapping[str, Any],
    read_mask: MaskReader | None,
    ids: Sequence[int] | None,
    number: int = 0,
) -> SubjectPrompt | None:
    if read_mask is not None and fields.get("mask") is not None:
        mask_HW = decode_mask(read_mask(fields["mask"]), ids)
        return SubjectPrompt(mask_HW=mask_HW, number=number)
    if fields.get("box_xyxy") is not None:
        box = _numbers(fields["box_xyxy"], "box_xyxy")
        if box.shape != (4,):
            raise ValueError(
                f"box_xyxy must be four numbers x0 y0 x1 y1, got {_truncated(fields['box_xyxy'])}"
            )
        _check_pixel_units(box, "box_xyxy")
        x0, y0, x1, y1 = box.tolist()
        return SubjectPrompt(box_xyxy=(x0, y0, x1, y1), number=number)
    if fields.get("points") is not None:
        points_xy = _numbers(fields["points"], "points")
        if len(np.atleast_1d(points_xy)) > MAX_POINTS:
            raise ValueError(f"{len(points_xy)} points; the limit is {MAX_POINTS}")
        _check_pixel_units(points_xy, "points")
        labels = _numbers(fields.get("point_labels", np.ones(points_xy.shape[:1])), "point_labels")
        if (labels % 1).any():
            raise ValueError(
                f"point_labels must be 0 or 1, got {_truncated(fields['point_labels'])}"
            )
        return SubjectPrompt(
            points_xy=points_xy, point_labels=labels.astype(np.int64), number=number
        )
    return None


def _check_pixel_units(coordinates: np.ndarray, name: str) -> None:
    """Reject coordinates that are fractions of the frame size instead of pixels."""
    # Up to 1.5, since detectors slightly exceed the frame.
    if coordinates.size and np.abs(coordinates).max() <= 1.5:
        raise ValueError(
            f"{name} {_truncated(coordinates.tolist())} lies within a pixel of the corner; "
            "coordinates must be pixels of the video, not fractions of its size: multiply x by its "
            "width and y by its height"
        )


def _mask_ids(
    fields: Mapping[str, Any], default: Sequence[int] | None = None
) -> Sequence[int] | None:
    """The mask values that belong to the subject, from `mask_ids`: an integer or a list."""
    given = fields.get("mask_ids")
    if given is None:
        return default
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(type(one) is int and 0 <= one <= 65535 for one in ids):
        raise ValueError(f"mask_ids must be integers from 0 to 65535, got {_truncated(given)}")
    return ids


def _check_count(count: int) -> None:
    if count > MAX_SUBJECTS:
        raise ValueError(f"{count} subjects; the limit is {MAX_SUBJECTS}")


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    text = fields.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {_truncated(text)}")
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {num_bytes:,} bytes; the limit is {MAX_TEXT_BYTES:,}")
    return text.strip() or None


def _numbers(value: Any, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be numbers, got {_truncated(value)}") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {_truncated(value)}")
    return numbers


def _truncated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
