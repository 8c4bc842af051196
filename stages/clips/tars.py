"""Webdataset tars to records; nothing is extracted, no name used as a path."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stages.clips.clip_members import record_of_members
from stages.clips.keys import KeyBook
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.tar_reading import MemberGroup, TarReader
from stages.clips.video_source import FilePart


def tar_records(path: Path, *, key_prefix: str) -> Iterator[ClipRecord | BadRecord]:
    """The records of one tar: the members that share the name up to its first dot, in any order.

    Hidden files and a Mac's `__MACOSX/` are left out; hard links are followed. A tar that ends
    early gives its readable part and a bad record. See `clip_members` for what a clip consists of.

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
                yield record_of_members(
                    key,
                    group.members,
                    read=partial(_content, reader, group),
                    video=partial(_part, reader, group),
                )


def count_records(path: Path) -> int:
    """How many records `tar_records` yields; seeks from header to header."""
    with TarReader(path) as reader:
        return len(reader.groups())


def _content(reader: TarReader, group: MemberGroup, suffix: str, limit: int) -> bytes:
    return reader.content(group.members[suffix], limit)


def _part(reader: TarReader, group: MemberGroup, suffix: str) -> FilePart:
    return reader.part(group.members[suffix])
