"""Webdataset tars to records; nothing is extracted, no name used as a path.

Used by `stages.clips.dataset`.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.clips.fields import (
    caption_from_fields,
    last_frame_from_fields,
    phrase_from_fields,
    subjects_from_fields,
)
from stages.clips.keys import VIDEO_SUFFIXES, KeyBook
from stages.clips.limits import (
    MAX_JSON_BYTES,
    MAX_MASK_BYTES,
    MAX_SUBJECTS,
    MAX_TEXT_BYTES,
    MAX_VIDEO_BYTES,
)
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.tar_reading import TarReader

_FIRST_MASK = re.compile(r"mask(?:\.([0-9]+))?\.png")
_LAST_MASK = re.compile(r"last\.mask(?:\.([0-9]+))?\.png")


def tar_records(path: Path, *, key_prefix: str) -> Iterator[ClipRecord | BadRecord]:
    """The records of one tar: consecutive members that share the name up to its first dot.

    Members of a clip: a video (`.mp4`, …); caption in `.txt`, else in `.json` under `caption`;
    the subject on the first frame in `.mask.png`, or several in `.mask.0.png`, `.mask.1.png`, …,
    else in `.json` as in a metadata file; on the last training frame in `.last.mask.png`, ….
    Other members are never read. A tar that ends early gives its readable part and a bad record.

    Args:
        path: The tar, not compressed.
        key_prefix: Put before each member key.
    """
    book = KeyBook()
    with TarReader(path) as reader:
        for group in reader.groups():
            key = key_prefix + group.key
            if refusal := book.claim(key):
                yield BadRecord(key=book.stand_in(key), reason="bad_record", detail=refusal)
            elif group.problem:
                yield BadRecord(key=key, reason="bad_record", detail=group.problem)
            else:
                yield _record(key, group.members, reader)


def count_records(path: Path) -> int:
    """How many records `tar_records` yields; seeks from header to header."""
    with TarReader(path) as reader:
        return sum(1 for _ in reader.groups())


def _record(
    key: str, members: dict[str, tarfile.TarInfo], reader: TarReader
) -> ClipRecord | BadRecord:
    videos = [suffix for suffix in VIDEO_SUFFIXES if suffix in members]
    if len(videos) != 1:
        found = ", ".join(sorted(members))
        return BadRecord(
            key=key,
            reason="bad_record",
            detail=f"expected one video beside its caption, found {found[:200]}",
        )
    try:
        fields = _json_fields(members, reader)
        caption = _caption(members, fields, reader)
        video = reader.content(members[videos[0]], MAX_VIDEO_BYTES)
    except ValueError as error:
        return BadRecord(key=key, reason="bad_record", detail=str(error))
    try:
        first_masks = _masks(members, _FIRST_MASK, reader)
        last_masks = _masks(members, _LAST_MASK, reader)
        return ClipRecord(
            key=key,
            video=video,
            caption=caption,
            prompts=subjects_from_fields(fields, mask_pngs=first_masks),
            last_frame_prompts=last_frame_from_fields(fields, mask_pngs=last_masks),
            phrase=phrase_from_fields(fields),
        )
    except ValueError as error:
        return BadRecord(key=key, reason="bad_prompt", detail=str(error))


def _masks(
    members: dict[str, tarfile.TarInfo], pattern: re.Pattern[str], reader: TarReader
) -> list[bytes]:
    """The mask images of one frame in number order; an unnumbered one stands alone."""
    found = {suffix: match[1] for suffix in members if (match := pattern.fullmatch(suffix))}
    if len(found) > MAX_SUBJECTS:
        raise ValueError(f"{len(found)} masks are given, at most {MAX_SUBJECTS} are read")
    if len(found) > 1 and None in found.values():
        raise ValueError(f"one mask is not numbered, others are: {', '.join(sorted(found))}")
    in_order = sorted(found, key=lambda suffix: (int(found[suffix] or 0), suffix))
    return [reader.content(members[suffix], MAX_MASK_BYTES) for suffix in in_order]


def _json_fields(members: dict[str, tarfile.TarInfo], reader: TarReader) -> dict[str, Any]:
    if "json" not in members:
        return {}
    content = reader.content(members["json"], MAX_JSON_BYTES)
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the .json is not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("the .json holds no object")
    return fields


def _caption(
    members: dict[str, tarfile.TarInfo], fields: dict[str, Any], reader: TarReader
) -> str | None:
    if "txt" in members:
        content = reader.content(members["txt"], MAX_TEXT_BYTES)
        try:
            return content.decode("utf-8-sig").strip() or None
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not UTF-8: {error}") from error
    return caption_from_fields(fields)
