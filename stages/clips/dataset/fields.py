"""Parses a clip's fields and files into its record."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from stages.clips.dataset.keys import UNSUPPORTED_SUFFIXES, VIDEO_SUFFIXES, videos_among
from stages.clips.dataset.masks import MAX_MASK_BYTES, decode_mask
from stages.clips.records import BadRecord, ClipRecord, SubjectPrompt
from stages.clips.video.streams import VideoSource

# Legend: H W pixels, N points.

MAX_JSON_BYTES = 16 << 20
"""Largest JSON of one clip in a tar (16 MiB)."""

MAX_TEXT_BYTES = 64 << 10
"""Longest caption or subject phrase (64 KiB); the text encoder reads at most 226 tokens."""

MAX_SUBJECTS = 64
"""Maximum number of subjects on one frame of a clip."""

MAX_POINTS = 1024
"""Maximum number of points of one subject."""

_FIRST_MASK = re.compile(r"mask(?:\.([0-9]+))?\.png")
_LAST_MASK = re.compile(r"last\.mask(?:\.([0-9]+))?\.png")

Read = Callable[[str, int], bytes]
"""Reads a file by (suffix, maximum bytes); ValueError if it is unreadable or larger."""

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
        fields: Any = None
        with suppress(ValueError):  # then the strict decoder decides
            fields = from_json(text, cache_strings="keys")  # keeps the last of duplicate fields
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


def text_from_fields(fields: Mapping[str, Any], name: str) -> str | None:
    """A caption or the phrase that describes the subject; None if it is missing or blank.

    Raises:
        ValueError: It is not a string, or longer than MAX_TEXT_BYTES.
    """
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


def record_of_members(
    key: str, suffixes: Collection[str], *, read: Read, video: Callable[[str], VideoSource]
) -> ClipRecord | BadRecord:
    """Build the record of the files that share a key.

    The video is `.mp4`, …. The caption is in `.txt`, or in `.json` if that is missing or blank. The
    subject on the first frame is in `.mask.png`, several are in `.mask.0.png`, `.mask.1.png`, …;
    otherwise in `.json`, with the fields of a metadata file. The subject on the last training frame
    is in `.last.mask.png`, …. Other files are ignored.

    Args:
        key: Key of the clip.
        suffixes: Suffixes of its files, lower case.
        read: Reads captions, JSON and masks.
        video: Returns the source of the video with a suffix; ValueError if it is unreadable.
    """
    videos = videos_among(suffixes)
    if len(videos) != 1:
        return BadRecord(key=key, reason="bad_record", detail=_describe_video_error(suffixes))
    try:
        fields = _json_file(read) if "json" in suffixes else {}
        text = _text_file(read) if "txt" in suffixes else None
        caption = text or text_from_fields(fields, name_of_caption(fields))
        found = video(videos[0])
    except ValueError as error:
        return BadRecord(key=key, reason="bad_record", detail=str(error))
    try:
        first, last = (_masks_by_number(suffixes, pattern) for pattern in (_FIRST_MASK, _LAST_MASK))
        prompts = subjects_from_fields(fields, mask_pngs=_read_all(first, read))
        return ClipRecord(
            key=key,
            video=found,
            caption=caption,
            prompts=prompts,
            last_frame_prompts=last_frame_from_fields(
                fields, first=prompts, mask_pngs=_read_all(last, read)
            ),
            phrase=text_from_fields(fields, "subject"),
        )
    except ValueError as error:
        return BadRecord(key=key, reason="bad_prompt", detail=str(error))


def _describe_video_error(suffixes: Collection[str]) -> str:
    found = ", ".join(sorted(suffixes))[:200]
    detail = f"expected one video and its caption, found {found}"
    if any(suffix.endswith(tuple(f".{known}" for known in VIDEO_SUFFIXES)) for suffix in suffixes):
        detail += "; a clip's key ends at the first dot: use no other dot before .mp4"
    unsupported = [suffix for suffix in UNSUPPORTED_SUFFIXES if suffix in suffixes]
    if unsupported and not videos_among(suffixes):
        detail += f"; {unsupported[0]} is not supported: convert it to mp4"
    return detail


def _masks_by_number(suffixes: Collection[str], pattern: re.Pattern[str]) -> dict[int, str]:
    """Suffixes of a frame's masks by number, in order; a single unnumbered mask has number 0."""
    matches = [match for suffix in suffixes if (match := pattern.fullmatch(suffix))]
    if len(matches) > MAX_SUBJECTS:
        raise ValueError(f"{len(matches)} masks; the limit is {MAX_SUBJECTS}")
    names = sorted(match[0] for match in matches)
    numbers = {None if match[1] is None else int(match[1]) for match in matches}
    if len(numbers) > 1 and None in numbers:
        raise ValueError(f"numbered and unnumbered masks are mixed: {', '.join(names)}")
    if len(numbers) < len(matches):
        raise ValueError(f"two masks have the same number: {', '.join(names)}")
    in_order = sorted(matches, key=lambda match: int(match[1] or 0))
    return {int(match[1] or 0): match[0] for match in in_order}


def _read_all(masks: dict[int, str], read: Read) -> dict[int, bytes]:
    return {number: read(suffix, MAX_MASK_BYTES) for number, suffix in masks.items()}


def _json_file(read: Read) -> dict[str, Any]:
    content = read("json", MAX_JSON_BYTES)
    try:
        return parse_object(content)
    except ValueError as error:
        raise ValueError(f"the .json is invalid: {error}") from error


def _text_file(read: Read) -> str | None:
    try:
        return read("txt", MAX_TEXT_BYTES).decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption is not UTF-8: {error}") from error


def read_at_most(path: Path, limit: int, shown: str) -> bytes:
    """Read a file of limited size.

    Args:
        path: The file.
        limit: Maximum size in bytes.
        shown: Name of the file in error messages.

    Raises:
        ValueError: The file is missing, not a regular file, too large, or unreadable.
    """
    try:
        # Reading a pipe or a device might never end.
        if path.exists() and not path.is_file():
            raise ValueError(f"{shown} is not a regular file")
        if path.stat().st_size > limit:
            raise ValueError(f"{shown} has {path.stat().st_size:,} bytes; the limit is {limit:,}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
