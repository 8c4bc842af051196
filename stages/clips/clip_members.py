"""One clip's files by their suffixes (`mp4`, `txt`, `json`, `mask.png`) to a record.

The same in a tar and in a folder: `lion.mp4`, `lion.txt`, `lion.mask.png` are one clip.
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
from stages.clips.keys import UNREAD_SUFFIXES, VIDEO_SUFFIXES, videos_among
from stages.clips.limits import MAX_JSON_BYTES, MAX_MASK_BYTES, MAX_SUBJECTS, MAX_TEXT_BYTES
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.video_source import VideoSource

_FIRST_MASK = re.compile(r"mask(?:\.([0-9]+))?\.png")
_LAST_MASK = re.compile(r"last\.mask(?:\.([0-9]+))?\.png")

Read = Callable[[str, int], bytes]
"""Content by suffix, at most so many bytes; ValueError when it cannot be read or is larger."""


def record_of_members(
    key: str, suffixes: Collection[str], *, read: Read, video: Callable[[str], VideoSource]
) -> ClipRecord | BadRecord:
    """The record of the files that share a key.

    A video (`.mp4`, …); caption in `.txt`, or where that is missing or blank in `.json`; the
    subject on the first frame in `.mask.png`, or several in `.mask.0.png`, `.mask.1.png`, …, else
    in `.json` as in a metadata file; on the last training frame in `.last.mask.png`, …. Other files
    are never read.

    Args:
        key: The clip's.
        suffixes: Of its files, lower case.
        read: Reads captions, JSON and masks.
        video: Where the video lies, by its suffix; ValueError when it cannot be read.
    """
    videos = videos_among(suffixes)
    if len(videos) != 1:
        return BadRecord(key=key, reason="bad_record", detail=_not_one_video(suffixes))
    try:
        fields = _json_file(read) if "json" in suffixes else {}
        text = _text_file(read) if "txt" in suffixes else None
        caption = text or caption_from_fields(fields, name_of_caption(fields))
        found = video(videos[0])
    except ValueError as error:
        return BadRecord(key=key, reason="bad_record", detail=str(error))
    try:
        first, last = (_numbered(suffixes, pattern) for pattern in (_FIRST_MASK, _LAST_MASK))
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


def _not_one_video(suffixes: Collection[str]) -> str:
    found = ", ".join(sorted(suffixes))[:200]
    detail = f"expected one video beside its caption, found {found}"
    if any(suffix.endswith(tuple(f".{known}" for known in VIDEO_SUFFIXES)) for suffix in suffixes):
        detail += "; a tar's clips are named up to the first dot: rename it with none before .mp4"
    unread = [suffix for suffix in UNREAD_SUFFIXES if suffix in suffixes]
    if unread and not videos_among(suffixes):
        detail += f"; {unread[0]} is not decoded: convert it to mp4"
    return detail


def _numbered(suffixes: Collection[str], pattern: re.Pattern[str]) -> dict[int, str]:
    """Suffixes of one frame's mask images by number, in order; an unnumbered one is 0, alone."""
    matches = [match for suffix in suffixes if (match := pattern.fullmatch(suffix))]
    if len(matches) > MAX_SUBJECTS:
        raise ValueError(f"{len(matches)} masks are given, at most {MAX_SUBJECTS} are read")
    names = sorted(match[0] for match in matches)
    numbers = {None if match[1] is None else int(match[1]) for match in matches}
    if len(numbers) > 1 and None in numbers:
        raise ValueError(f"one mask is not numbered, others are: {', '.join(names)}")
    if len(numbers) < len(matches):
        raise ValueError(f"two masks have one number: {', '.join(names)}")
    in_order = sorted(matches, key=lambda match: int(match[1] or 0))
    return {int(match[1] or 0): match[0] for match in in_order}


def _read_all(masks: dict[int, str], read: Read) -> dict[int, bytes]:
    return {number: read(suffix, MAX_MASK_BYTES) for number, suffix in masks.items()}


def _json_file(read: Read) -> dict[str, Any]:
    content = read("json", MAX_JSON_BYTES)
    try:
        return parse_object(content)
    except ValueError as error:
        raise ValueError(f"the .json is no clip's: {error}") from error


def _text_file(read: Read) -> str | None:
    try:
        return read("txt", MAX_TEXT_BYTES).decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption is not UTF-8: {error}") from error
