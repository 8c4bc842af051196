"""Builds a clip's record from its files, identified by suffix (`mp4`, `txt`, `json`, `mask.png`).

Tars and folders use the same rules: `lion.mp4`, `lion.txt` and `lion.mask.png` are one clip.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from stages.clips.fields import (
    caption_from_fields,
    last_frame_from_fields,
    name_of_caption,
    parse_object,
    phrase_from_fields,
    subjects_from_fields,
)
from stages.clips.keys import UNSUPPORTED_SUFFIXES, VIDEO_SUFFIXES, videos_among
from stages.clips.limits import MAX_JSON_BYTES, MAX_MASK_BYTES, MAX_SUBJECTS, MAX_TEXT_BYTES
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.video_source import VideoSource

_FIRST_MASK = re.compile(r"mask(?:\.([0-9]+))?\.png")
_LAST_MASK = re.compile(r"last\.mask(?:\.([0-9]+))?\.png")

Read = Callable[[str, int], bytes]
"""Reads a file by (suffix, maximum bytes); ValueError if it is unreadable or larger."""


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
        caption = text or caption_from_fields(fields, name_of_caption(fields))
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
            phrase=phrase_from_fields(fields),
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
