"""Reads the records of webdataset tars, without extracting files or using names as paths."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stages.clips.clip_members import record_of_members
from stages.clips.keys import KeyRegistry
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.tar_reading import MemberGroup, TarReader
from stages.clips.video_source import FilePart


def tar_records(path: Path, *, key_prefix: str) -> Iterator[ClipRecord | BadRecord]:
    """Read the records of one tar, grouping members by their name up to its first dot.

    Hidden files and macOS's `__MACOSX/` are ignored; hard links are followed. A truncated tar
    yields its readable part and a bad record. See `clip_members` for the files of a clip.

    Args:
        path: The uncompressed tar.
        key_prefix: Prefix of each key.
    """
    registry = KeyRegistry()
    with TarReader(path) as reader:
        for group in reader.groups():
            key = key_prefix + group.key
            if reason := registry.claim(key):
                yield BadRecord(key=registry.substitute(key), reason="bad_record", detail=reason)
            elif group.problem:
                yield BadRecord(key=key, reason="bad_record", detail=group.problem)
            else:
                yield record_of_members(
                    key,
                    group.members,
                    read=partial(_content, reader, group),
                    video=partial(_part, reader, group),
                )


def count_records(path: Path) -> int:
    """Number of records that `tar_records` yields; reads only the headers."""
    with TarReader(path) as reader:
        return len(reader.groups())


def _content(reader: TarReader, group: MemberGroup, suffix: str, limit: int) -> bytes:
    return reader.content(group.members[suffix], limit)


def _part(reader: TarReader, group: MemberGroup, suffix: str) -> FilePart:
    return reader.part(group.members[suffix])
