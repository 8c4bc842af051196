"""Webdataset tars: members grouped into records; nothing is extracted, no name used as a path.

`stages.clips.dataset` reads them. Members are grouped as webdataset groups them; its own reader
takes a member of any size into memory, and compressed tars, so headers are read here.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.clips.fields import (
    caption_from_fields,
    last_frame_from_fields,
    phrase_from_fields,
    subjects_from_fields,
)
from stages.clips.keys import VIDEO_SUFFIXES, KeyBook
from stages.clips.limits import MAX_MASK_BYTES, MAX_SUBJECTS, MAX_TEXT_BYTES, MAX_VIDEO_BYTES
from stages.clips.records import BadRecord, ClipRecord

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key up to the first dot of the file name, and suffix after it: webdataset's rule."""

_FIRST_MASK = re.compile(r"mask(?:\.([0-9]+))?\.png")
_LAST_MASK = re.compile(r"last\.mask(?:\.([0-9]+))?\.png")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on headers that are cut, damaged or made up."""


@dataclass(slots=True)
class _Group:
    """Consecutive members that share a key."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    """By suffix, lower case."""
    problem: str | None = None


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
    with _Reader(path) as reader:
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
    with _Reader(path) as reader:
        return sum(1 for _ in reader.groups())


class _Reader:
    """One open tar: its groups in order, and the content of a member of the current one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()

    def groups(self) -> Iterator[_Group]:
        """The groups; where the tar cannot be read on, one with that problem, and the end."""
        group: _Group | None = None
        problem: str | None = None
        members = self._members()
        while True:
            try:
                member = next(members, None)
            except _UNREADABLE as error:
                problem = f"the tar cannot be read on from here: {error}"
                break
            if member is None:
                break
            key, suffix = _split(member.name)
            if key is None:
                continue
            if group is None or key != group.key:
                if group is not None:
                    yield group
                group = _Group(key)
            if suffix in group.members:
                group.problem = f"the tar holds {key}.{suffix} twice"
            group.members[suffix] = member
        if problem is not None:
            group = group or _Group("start")
            group.problem = problem
        if group is not None:
            yield group

    def content(self, member: tarfile.TarInfo, limit: int) -> bytes:
        """The bytes of a member.

        Raises:
            ValueError: It is over the limit, sparse, or cut off.
        """
        if member.size > limit:
            raise ValueError(f"{_shown(member)} has {member.size:,} bytes, at most {limit:,} fit")
        if member.issparse():
            raise ValueError(f"{_shown(member)} is a sparse member; write the tar without --sparse")
        assert self._tar is not None
        try:
            file = self._tar.extractfile(member)
            content = b"" if file is None else file.read()
        except _UNREADABLE as error:
            raise ValueError(f"{_shown(member)} cannot be read: {error}") from error
        if len(content) != member.size:
            raise ValueError(f"{_shown(member)} is cut off after {len(content):,} bytes")
        return content

    def _members(self) -> Iterator[tarfile.TarInfo]:
        self._tar = tar = _open(self._path)
        reached = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            if member.size < 0 or member.offset <= reached:
                raise ValueError(f"the header of {_shown(member)} gives an impossible size")
            reached = member.offset
            if member.isreg():
                yield member
        # tarfile takes a header it cannot read for the end, which is a block of zeros.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)  # type: ignore[attr-defined]
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"the header at byte {tar.offset} is damaged")  # type: ignore[attr-defined]


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:", errorlevel=2)
    except tarfile.ReadError as error:
        with path.open("rb") as file:
            start = file.read(8)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(
                    f"it is compressed with {name}; videos gain nothing by it, and a compressed "
                    "tar has no bounds: write it uncompressed"
                ) from error
        raise


def _split(name: str) -> tuple[str | None, str]:
    found = _NAME.fullmatch(name.removeprefix("./"))
    return (found[1], found[2].lower()) if found else (None, "")


def _shown(member: tarfile.TarInfo) -> str:
    return repr(member.name if len(member.name) <= 80 else f"{member.name[:79]}…")


def _record(
    key: str, members: dict[str, tarfile.TarInfo], reader: _Reader
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
    members: dict[str, tarfile.TarInfo], pattern: re.Pattern[str], reader: _Reader
) -> list[bytes]:
    """The mask images of one frame in number order; an unnumbered one stands alone."""
    found = {suffix: match[1] for suffix in members if (match := pattern.fullmatch(suffix))}
    if len(found) > MAX_SUBJECTS:
        raise ValueError(f"{len(found)} masks are given, at most {MAX_SUBJECTS} are read")
    if len(found) > 1 and None in found.values():
        raise ValueError(f"one mask is not numbered, others are: {', '.join(sorted(found))}")
    in_order = sorted(found, key=lambda suffix: (int(found[suffix] or 0), suffix))
    return [reader.content(members[suffix], MAX_MASK_BYTES) for suffix in in_order]


def _json_fields(members: dict[str, tarfile.TarInfo], reader: _Reader) -> dict[str, Any]:
    if "json" not in members:
        return {}
    content = reader.content(members["json"], MAX_TEXT_BYTES)
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the .json is not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("the .json holds no object")
    return fields


def _caption(
    members: dict[str, tarfile.TarInfo], fields: dict[str, Any], reader: _Reader
) -> str | None:
    if "txt" in members:
        content = reader.content(members["txt"], MAX_TEXT_BYTES)
        try:
            return content.decode("utf-8-sig").strip() or None
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not UTF-8: {error}") from error
    return caption_from_fields(fields)
