"""What an entry of a dataset says of its clip: caption, subjects, words; for tars and folders."""

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
"""Reads the PNG that a `mask` field names; ValueError when it cannot."""

_PROMPT_FIELDS = ("mask", "box_xyxy", "points")

KNOWN_FIELDS = (
    *("caption", "subject", "subjects", "last_frame"),
    *(*_PROMPT_FIELDS, "mask_ids", "point_labels"),
)
"""What an entry may say of its clip; other fields mean nothing."""

_OTHER_CAPTIONS = ("text", "prompt")
"""Fields that hold the caption where there is no field of that name."""


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object that the bytes hold.

    Raises:
        ValueError: They hold anything else, or an object with one field twice.
    """
    try:
        plain = content.removeprefix(codecs.BOM_UTF8)
        fields = _parse_fast(plain)
        # Each field has a colon, so that with no more of them than fields none is given twice.
        if not isinstance(fields, dict) or plain.count(b":") != len(fields):
            fields = _STRICT_DECODER.decode(plain.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object: {_short(fields)}")
    return fields


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {_short(twice)} is given twice")
    return fields


_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)
"""Ten times slower than pydantic_core; takes deeper nesting and half surrogate pairs too."""


def _parse_fast(content: bytes) -> Any:
    """What the bytes hold, of a name given twice the last; None for what the other must look at."""
    try:
        return from_json(content, cache_strings="keys")
    except ValueError:
        return None


def name_of_caption(fields: Collection[str]) -> str:
    """Which of the fields holds the caption: caption, else text or prompt.

    Raises:
        ValueError: Both text and prompt might.
    """
    others = [name for name in _OTHER_CAPTIONS if name in fields]
    if "caption" in fields or not others:
        return "caption"
    if len(others) > 1:
        raise ValueError(f"no caption, but {' and '.join(others)}; call the one meant caption")
    return others[0]


def caption_from_fields(fields: Mapping[str, Any], name: str = "caption") -> str | None:
    """The caption among a record's fields; None when missing or blank.

    Args:
        fields: The record's.
        name: Of the field that holds it.

    Raises:
        ValueError: It is something other than text, or longer than MAX_TEXT_BYTES.
    """
    return _text(fields, name)


def phrase_from_fields(fields: Mapping[str, Any]) -> str | None:
    """The words for the subject (`subject`) among a record's fields; None when missing or blank.

    Raises:
        ValueError: It is something other than text, or longer than MAX_TEXT_BYTES.
    """
    return _text(fields, "subject")


def subjects_from_fields(
    fields: Mapping[str, Any],
    *,
    mask_pngs: Mapping[int, bytes] | None = None,
    read_mask: MaskReader | None = None,
) -> tuple[SubjectPrompt, ...]:
    """The subjects that a dataset gives for one frame, () when it gives none.

    Args:
        fields: One subject's fields (`mask`, else `box_xyxy`, else `points` + `point_labels`), or
            `subjects`, a list of objects with such fields. `mask_ids` names the values of a mask
            that are the subject.
        mask_pngs: Masks that lie beside the fields, by the subject's number; they go before a box
            and points.
        read_mask: Reads what `mask` names; None where masks lie beside, and `mask` means nothing.

    Raises:
        ValueError: What is given is malformed, given twice, unreadable, or more than MAX_SUBJECTS.
    """
    mask_pngs = mask_pngs or {}
    names = _PROMPT_FIELDS if read_mask else _PROMPT_FIELDS[1:]
    listed = fields.get("subjects")
    ids = _ids(fields)
    if listed is None:
        _check_count(len(mask_pngs))
        if mask_pngs:
            return tuple(
                SubjectPrompt(mask_HW=decode_mask(png, ids), number=number)
                for number, png in mask_pngs.items()
            )
        prompt = _prompt(fields, read_mask, ids)
        if ids is not None and (prompt is None or prompt.kind != "mask"):
            raise ValueError("mask_ids are given, and no mask that they could be values of")
        return () if prompt is None else (prompt,)
    beside = [name for name in names if fields.get(name) is not None]
    if beside or mask_pngs:
        found = ", ".join(beside) or "mask images"
        raise ValueError(f"subjects and {found} are both given; put every subject into subjects")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ValueError(f"subjects must be a list of objects, got {_short(listed)}")
    _check_count(len(listed))
    prompts = []
    for number, entry in enumerate(listed):
        prompt = _prompt(entry, read_mask, _ids(entry, ids), number)
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
    """The subjects on the last training frame, from the object `last_frame`; else as above.

    `mask_ids` of the first frame hold for it too, unless it has its own. Masks that lie beside are
    the subjects of their numbers; those of a list are the first frame's in their order, where there
    are as many.

    Args:
        fields: As above.
        first: The subjects on the first frame.
        mask_pngs: As above.
        read_mask: As above.

    Raises:
        ValueError: As above.
    """
    last_frame = fields.get("last_frame")
    if last_frame is not None and not isinstance(last_frame, dict):
        raise ValueError(f"last_frame must be an object, got {_short(last_frame)}")
    of_last = dict(last_frame or {})
    gives_mask = mask_pngs or (read_mask and of_last.get("mask") is not None)
    if (gives_mask or of_last.get("subjects")) and fields.get("mask_ids") is not None:
        of_last.setdefault("mask_ids", fields["mask_ids"])
    try:
        last = subjects_from_fields(of_last, mask_pngs=mask_pngs, read_mask=read_mask)
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
                f"box_xyxy must be four numbers x0 y0 x1 y1, got {_short(fields['box_xyxy'])}"
            )
        _refuse_shares(box, "box_xyxy")
        x0, y0, x1, y1 = box.tolist()
        return SubjectPrompt(box_xyxy=(x0, y0, x1, y1), number=number)
    if fields.get("points") is not None:
        points_xy = _numbers(fields["points"], "points")
        if len(np.atleast_1d(points_xy)) > MAX_POINTS:
            raise ValueError(f"{len(points_xy)} points are given, at most {MAX_POINTS} are read")
        _refuse_shares(points_xy, "points")
        labels = _numbers(fields.get("point_labels", np.ones(points_xy.shape[:1])), "point_labels")
        if (labels % 1).any():
            raise ValueError(f"point_labels must be 0 or 1, got {_short(fields['point_labels'])}")
        return SubjectPrompt(
            points_xy=points_xy, point_labels=labels.astype(np.int64), number=number
        )
    return None


def _refuse_shares(coordinates: np.ndarray, name: str) -> None:
    """Refuse what would lie within a pixel of the corner: shares of the frame's size."""
    # Detectors go over the edge by a little.
    if coordinates.size and np.abs(coordinates).max() <= 1.5:
        raise ValueError(
            f"{name} {_short(coordinates.tolist())} lies within a pixel of the corner; coordinates "
            "are pixels of the video, not shares of its size: multiply x by its width and y by its "
            "height"
        )


def _ids(fields: Mapping[str, Any], otherwise: Sequence[int] | None = None) -> Sequence[int] | None:
    """The values of a mask that are the subject, of `mask_ids`: a number or a list of them."""
    given = fields.get("mask_ids")
    if given is None:
        return otherwise
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(type(one) is int and 0 <= one <= 65535 for one in ids):
        raise ValueError(f"mask_ids must be numbers from 0 to 65535, got {_short(given)}")
    return ids


def _check_count(count: int) -> None:
    if count > MAX_SUBJECTS:
        raise ValueError(f"{count} subjects are given, at most {MAX_SUBJECTS} are read")


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    text = fields.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {_short(text)}")
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {num_bytes:,} bytes, at most {MAX_TEXT_BYTES:,} fit")
    return text.strip() or None


def _numbers(value: Any, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be numbers, got {_short(value)}") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {_short(value)}")
    return numbers


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:79]}…"
