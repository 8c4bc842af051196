"""Headers and contents of a tar, grouped into clips and bounded; `stages.clips.tars` reads them.

All headers are read first, seeking from one to the next, so that the members of a clip may lie
anywhere in the tar. webdataset's own reader groups neighbours alone, takes a member of any size
into memory, unpacks compressed tars and loads torch, so tars are read here.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from stages.clips.video_source import FilePart

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key up to the first dot of the file name, and suffix after it: webdataset's rule."""

_MAX_HEADER_BYTES = 1 << 20
"""Longest extended header (1 MiB); names and attributes are far shorter."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}

_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on headers that are cut, damaged or made up."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """Where a member's content lies; of a hard link, where its target's does."""

    name: str
    offset: int
    """Of the content, in bytes."""
    size: int
    problem: str | None = None
    """Why its content cannot be used."""


@dataclass(slots=True)
class MemberGroup:
    """All members of a tar that share a key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """By suffix, lower case."""
    problem: str | None = None
    """Why they cannot be used together."""


class TarReader:
    """One open tar: its groups, and the contents of their members."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _BoundedFile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def groups(self) -> list[MemberGroup]:
        """The groups, in the order of their first members; reads every header, no content.

        Where the tar cannot be read on, the group that was being read has that problem, and so has
        every group when members of different clips are mixed: each may have lost some.
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
                    group.problem = f"the tar holds {key}.{suffix} twice"
                group.members[suffix] = member
                last = group
        except _UNREADABLE as error:
            last = last or groups.setdefault("start", MemberGroup("start"))
            for group in groups.values() if is_mixed else (last,):
                group.problem = f"the tar cannot be read on from here: {error}"
                if group is not last:
                    group.problem = (
                        f"the tar cannot be read to its end, where members of this clip may lie: "
                        f"{error}; `tar --sort=name` keeps them together"
                    )
        return list(groups.values())

    def content(self, member: TarMember, limit: int) -> bytes:
        """The bytes of a member.

        Raises:
            ValueError: It is over the limit, sparse, a link that leads nowhere, cut off, or cannot
                be read.
        """
        if member.size > limit:
            raise ValueError(f"{_shown(member)} has {member.size:,} bytes, at most {limit:,} fit")
        if member.problem:
            raise ValueError(f"{_shown(member)} {member.problem}")
        assert self._file is not None
        self._file.seek(member.offset)
        try:
            content = self._file.read(member.size, limit=limit)
        except OSError as error:
            raise ValueError(f"{_shown(member)} cannot be read: {error}") from error
        if len(content) != member.size:
            raise ValueError(f"{_shown(member)} is cut off after {len(content):,} bytes")
        return content

    def part(self, member: TarMember) -> FilePart:
        """Where a member's bytes lie; none of them is read.

        Raises:
            ValueError: It is sparse, a link that leads nowhere, or cut off.
        """
        if member.problem:
            raise ValueError(f"{_shown(member)} {member.problem}")
        there = self._path.stat().st_size - member.offset
        if there < member.size:
            raise ValueError(f"{_shown(member)} is cut off after {max(0, there):,} bytes")
        return FilePart(self._path, member.offset, member.size)

    def _members(self) -> Iterator[tuple[str, str, TarMember]]:
        """Key, suffix and place of each file that could be part of a clip."""
        self._file = self._stack.enter_context(_BoundedFile(io.FileIO(self._path)))
        _refuse_compression(self._file)
        places: dict[str, TarMember] = {}
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            reached = -1
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                if header.size < 0 or header.offset <= reached:
                    raise ValueError(f"the header of {_shown(header)} gives an impossible size")
                reached = header.offset
                if not (header.isreg() or header.islnk() or header.issym()):
                    continue
                member = _located(header, places)
                if header.isreg():
                    places[header.name] = member
                key, suffix = _split(header.name)
                if key is not None:
                    yield key, suffix, member
            # tarfile takes a header it cannot read for the end, which is a block of zeros.
            self._file.seek(tar.offset)
            if self._file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"the header at byte {tar.offset} is damaged")


def _located(header: tarfile.TarInfo, earlier: dict[str, TarMember]) -> TarMember:
    """A member's place; `earlier` are the files before it, among which a hard link's target is."""
    if header.issym():
        problem = "is a symbolic link; write the tar with --dereference"
        return TarMember(header.name, offset=0, size=0, problem=problem)
    if header.islnk():
        target = earlier.get(header.linkname)
        if target is None:
            problem = f"is a hard link to {header.linkname[:80]!r}, which the tar lacks before it"
            return TarMember(header.name, offset=0, size=0, problem=problem)
        return TarMember(header.name, target.offset, target.size, target.problem)
    sparse = "is a sparse member; write the tar without --sparse" if header.issparse() else None
    return TarMember(header.name, header.offset_data, header.size, problem=sparse)


class _BoundedFile(io.BufferedReader):
    """A file that is not read in big pieces unasked: a header can claim any size for itself."""

    def read(self, size: int | None = -1, /, *, limit: int = _MAX_HEADER_BYTES) -> bytes:
        """As always, but up to `limit` bytes.

        Raises:
            ValueError: More are asked for.
        """
        if size is None or not 0 <= size <= limit:
            raise ValueError(f"a header claims {size} bytes, at most {limit:,} fit")
        return super().read(size)


def _refuse_compression(file: _BoundedFile) -> None:
    start = file.peek(8)[:8]
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"it is compressed with {name}; videos gain nothing by it, and what it unpacks to "
                f"has no bounds: unpack it with {command}"
            )


def _split(name: str) -> tuple[str | None, str]:
    """Key and suffix; no key for hidden files (`.DS_Store`, `._lion.mp4`) and for `__MACOSX/`."""
    *folders, base = name.removeprefix("./").split("/")
    if base.startswith(".") or "__MACOSX" in folders:
        return None, ""
    found = _NAME.fullmatch("/".join([*folders, base]))
    return (found[1], found[2].lower()) if found else (None, "")


def _shown(member: TarMember | tarfile.TarInfo) -> str:
    return repr(member.name if len(member.name) <= 80 else f"{member.name[:79]}…")
