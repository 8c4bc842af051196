"""Reads the records of webdataset tars, without extracting files or using names as paths.

All headers are read first, seeking from one to the next, so that the members of a clip may be
anywhere in the tar. webdataset's reader is not used: it groups only adjacent members, reads members
of any size into memory, unpacks compressed tars and imports torch.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stages.clips.dataset.fields import record_of_members
from stages.clips.dataset.keys import KeyRegistry
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.video.streams import FilePart

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key up to the first dot of the file name, and the suffix after it, as in webdataset."""

_MAX_HEADER_BYTES = 1 << 20
"""Longest extended header (1 MiB); names and attributes are far shorter."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}

_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""Exceptions raised by tarfile for truncated, damaged or malicious headers."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """Location of a member's content; of a hard link, that of its target."""

    name: str
    offset: int
    """Offset of the content in the tar, bytes."""
    size: int
    problem: str | None = None
    """Why its content cannot be used, if it cannot."""


@dataclass(slots=True)
class MemberGroup:
    """All members of a tar that share a key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """Members by suffix, lower case."""
    problem: str | None = None
    """Why the group cannot be used, if it cannot."""


def tar_records(path: Path, *, key_prefix: str) -> Iterator[ClipRecord | BadRecord]:
    """Read the records of one tar, grouping members by their name up to its first dot.

    Hidden files and macOS's `__MACOSX/` are ignored; hard links are followed. A truncated tar
    yields its readable part and a bad record. See `record_of_members` for the files of a clip.

    Args:
        path: The uncompressed tar.
        key_prefix: Prefix of each key.
    """
    registry = KeyRegistry()
    with TarReader(path) as reader:
        for group in reader.groups():
            key = key_prefix + group.key
            yield registry.reject(key, group.problem) or record_of_members(
                key,
                group.members,
                read=partial(reader.content, group),
                video=partial(reader.part, group),
            )


def count_records(path: Path) -> int:
    """Number of records that `tar_records` yields; reads only the headers."""
    with TarReader(path) as reader:
        return len(reader.groups())


class TarReader:
    """An open tar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _BoundedFile | None = None

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def groups(self) -> list[MemberGroup]:
        """Read all headers and return the groups, in the order of their first members.

        If a header cannot be read, the last group gets a `problem`. If members of different clips
        are interleaved, every group does, since any may lack members.
        """
        groups: dict[str, MemberGroup] = {}
        last: MemberGroup | None = None
        is_mixed = False
        try:
            for key, suffix, member in self._members():
                is_new = key not in groups
                group = groups.setdefault(key, MemberGroup(key))
                is_mixed |= not is_new and group is not last
                if suffix in group.members:
                    group.problem = f"the tar contains {key}.{suffix} twice"
                group.members[suffix] = member
                last = group
        except _UNREADABLE as error:
            last = last or groups.setdefault("start", MemberGroup("start"))
            for group in groups.values() if is_mixed else (last,):
                group.problem = f"the tar cannot be read from here on: {error}"
                if group is not last:
                    group.problem = (
                        "the tar cannot be read to its end, which may contain members of this "
                        f"clip: {error}; `tar --sort=name` keeps them together"
                    )
        return list(groups.values())

    def content(self, group: MemberGroup, suffix: str, limit: int) -> bytes:
        """Read the content of a member.

        Raises:
            ValueError: It is over the limit, sparse, a broken link, truncated or unreadable.
        """
        member = group.members[suffix]
        if member.size > limit:
            raise ValueError(
                f"{_display_name(member)} has {member.size:,} bytes; the limit is {limit:,}"
            )
        if member.problem:
            raise ValueError(f"{_display_name(member)} {member.problem}")
        assert self._file is not None
        self._file.seek(member.offset)
        try:
            content = self._file.read(member.size, limit=limit)
        except OSError as error:
            raise ValueError(f"{_display_name(member)} cannot be read: {error}") from error
        if len(content) != member.size:
            raise ValueError(f"{_display_name(member)} is truncated after {len(content):,} bytes")
        return content

    def part(self, group: MemberGroup, suffix: str) -> FilePart:
        """Location of a member's content, which is not read.

        Raises:
            ValueError: It is sparse, a broken link, or truncated.
        """
        member = group.members[suffix]
        if member.problem:
            raise ValueError(f"{_display_name(member)} {member.problem}")
        available = self._path.stat().st_size - member.offset
        if available < member.size:
            raise ValueError(
                f"{_display_name(member)} is truncated after {max(0, available):,} bytes"
            )
        return FilePart(self._path, member.offset, member.size)

    def _members(self) -> Iterator[tuple[str, str, TarMember]]:
        """Key, suffix and location of each file that may be part of a clip."""
        self._file = _BoundedFile(io.FileIO(self._path))
        _reject_compressed(self._file)
        regular_files: dict[str, TarMember] = {}
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            last_offset = -1
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
                if header.size < 0 or header.offset <= last_offset:
                    raise ValueError(
                        f"the header of {_display_name(header)} states an impossible size"
                    )
                last_offset = header.offset
                if not (header.isreg() or header.islnk() or header.issym()):
                    continue
                member = _locate(header, regular_files)
                if header.isreg():
                    regular_files[header.name] = member
                key, suffix = _split_name(header.name)
                if key is not None:
                    yield key, suffix, member
            # tarfile treats an unreadable header as the end, which is really a block of zeros.
            self._file.seek(tar.offset)
            if self._file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"the header at byte {tar.offset} is damaged")


def _locate(header: tarfile.TarInfo, preceding: dict[str, TarMember]) -> TarMember:
    """Locate a member; a hard link's target must be among the preceding files."""
    if header.issym():
        problem = "is a symbolic link; write the tar with --dereference"
        return TarMember(header.name, offset=0, size=0, problem=problem)
    if header.islnk():
        target = preceding.get(header.linkname)
        if target is None:
            problem = f"is a hard link to {header.linkname[:80]!r}, which does not precede it"
            return TarMember(header.name, offset=0, size=0, problem=problem)
        return TarMember(header.name, target.offset, target.size, target.problem)
    sparse = "is a sparse member; write the tar without --sparse" if header.issparse() else None
    return TarMember(header.name, header.offset_data, header.size, problem=sparse)


class _BoundedFile(io.BufferedReader):
    """A file with limited reads: a header can claim any size."""

    def read(self, size: int | None = -1, /, *, limit: int = _MAX_HEADER_BYTES) -> bytes:
        """Read at most `limit` bytes.

        Raises:
            ValueError: More are requested.
        """
        if size is None or not 0 <= size <= limit:
            raise ValueError(f"a header claims {size} bytes; the limit is {limit:,}")
        return super().read(size)


def _reject_compressed(file: _BoundedFile) -> None:
    start = file.peek(8)[:8]
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"it is compressed with {name}, and only uncompressed tars are read: unpack it "
                f"with {command}"
            )


def _split_name(name: str) -> tuple[str | None, str]:
    """Key and suffix; no key for hidden files (`.DS_Store`, `._lion.mp4`) and `__MACOSX/`."""
    *folders, base = name.removeprefix("./").split("/")
    if base.startswith(".") or "__MACOSX" in folders:
        return None, ""
    found = _NAME.fullmatch("/".join([*folders, base]))
    return (found[1], found[2].lower()) if found else (None, "")


def _display_name(member: TarMember | tarfile.TarInfo) -> str:
    return repr(member.name if len(member.name) <= 80 else f"{member.name[:79]}…")
