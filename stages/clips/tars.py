"""Webdataset tars: members grouped into records; nothing is extracted, no name used as a path.

webdataset loads torch, so it is imported where a tar is read: a configuration loads without it.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.clips.fields import caption_from_fields, prompt_from_fields
from stages.clips.keys import VIDEO_SUFFIXES, KeyBook
from stages.clips.records import BadRecord, ClipRecord

_Members = dict[str, bytes]


def tar_records(path: Path, *, key_prefix: str) -> Iterator[ClipRecord | BadRecord]:
    """The records of one tar: consecutive members that share the name up to its first dot.

    Members of a clip: a video (`.mp4`, …); caption in `.txt`, else in `.json` under `caption`;
    prompt in `.mask.png`, else in `.json` under `box_xyxy` or `points` (+ `point_labels`). Other
    members of a group are ignored. A tar that ends early gives its readable part and a bad record.

    Args:
        path: The tar.
        key_prefix: Put before each member key.
    """
    book = KeyBook()
    for member_key, members, problem in _samples(path):
        key = key_prefix + member_key
        if refusal := book.claim(key):
            yield BadRecord(key=book.stand_in(key), reason="bad_record", detail=refusal)
        elif problem:
            yield BadRecord(key=key, reason="bad_record", detail=problem)
        else:
            yield _record(key, members)


def count_samples(path: Path) -> int:
    """How many records `tar_records` yields of a whole tar; seeks from header to header."""
    count, current = 0, None
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                key, _ = _split(member.name) if member.isreg() else (None, "")
                if key is not None and key != current:
                    count, current = count + 1, key
    except (tarfile.TarError, OSError):
        count += 1  # the bad record that stands for the unreadable rest
    return count


def _samples(path: Path) -> Iterator[tuple[str, _Members, str | None]]:
    """Member key, members by suffix, and what is wrong with the group."""
    from webdataset.tariterators import tar_file_iterator

    current: str | None = None
    members: _Members = {}
    problem: str | None = None
    try:
        with path.open("rb") as file:
            for member in tar_file_iterator(file, skip_meta=None):
                key, suffix = _split(member["fname"])
                if key is None:
                    continue
                if key != current:
                    if current is not None:
                        yield current, members, problem
                    current, members, problem = key, {}, None
                if suffix in members:
                    problem = f"the tar holds {key}.{suffix} twice"
                members[suffix] = member["data"]
    except (tarfile.TarError, OSError, EOFError) as error:
        yield current or "start", {}, f"the tar cannot be read on from here: {error}"
        return
    if current is not None:
        yield current, members, problem


def _split(name: str) -> tuple[str | None, str]:
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name.removeprefix("./"))
    return (key, suffix.lower()) if key is not None else (None, "")


def _record(key: str, members: _Members) -> ClipRecord | BadRecord:
    videos = [suffix for suffix in VIDEO_SUFFIXES if suffix in members]
    if len(videos) != 1:
        found = ", ".join(sorted(members))
        return BadRecord(
            key=key,
            reason="bad_record",
            detail=f"expected one video beside its caption, found {found}",
        )
    try:
        fields = _json_fields(members)
        caption = _caption(members, fields)
    except ValueError as error:
        return BadRecord(key=key, reason="bad_record", detail=str(error))
    try:
        prompt = prompt_from_fields(fields, members.get("mask.png"))
    except ValueError as error:
        return BadRecord(key=key, reason="bad_prompt", detail=str(error))
    return ClipRecord(key=key, video=members[videos[0]], caption=caption, prompt=prompt)


def _json_fields(members: _Members) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        fields = json.loads(members["json"].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the .json is not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("the .json holds no object")
    return fields


def _caption(members: _Members, fields: dict[str, Any]) -> str | None:
    if "txt" in members:
        try:
            return members["txt"].decode("utf-8-sig").strip() or None
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not UTF-8: {error}") from error
    return caption_from_fields(fields)
