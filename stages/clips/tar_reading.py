"""Headers and contents of a tar, grouped into clips and bounded; `stages.clips.tars` reads them.

Members are grouped as webdataset groups them. Its own reader takes a member of any size into
memory, unpacks compressed tars and loads torch, so tars are read here.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key up to the first dot of the file name, and suffix after it: webdataset's rule."""

_MAX_HEADER_BYTES = 1 << 20
"""Longest extended header (1 MiB); names and attributes are far shorter."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on headers that are cut, damaged or made up."""


@dataclass(slots=True)
class MemberGroup:
    """Consecutive members that share a key."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    """By suffix, lower case."""
    problem: str | None = None
    """Why they cannot be used together."""


class TarReader:
    """One open tar: its groups in order, and the contents of the current one's members."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _BoundedFile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def groups(self) -> Iterator[MemberGroup]:
        """The groups; where the tar cannot be read on, a last one with that problem."""
        group: MemberGroup | None = None
        try:
            for member in self._members():
                key, suffix = _split(member.name)
                if key is None:
                    continue
                if group is None or key != group.key:
                    if group is not None:
                        yield group
                    group = MemberGroup(key)
                if suffix in group.members:
                    group.problem = f"the tar holds {key}.{suffix} twice"
                group.members[suffix] = member
        except _UNREADABLE as error:
            group = group or MemberGroup("start")
            group.problem = f"the tar cannot be read on from here: {error}"
        if group is not None:
            yield group

    def content(self, member: tarfile.TarInfo, limit: int) -> bytes:
        """The bytes of a member of the group that `groups` gave last.

        Raises:
            ValueError: It is over the limit, sparse, cut off, or cannot be read.
        """
        if member.size > limit:
            raise ValueError(f"{_shown(member)} has {member.size:,} bytes, at most {limit:,} fit")
        if member.issparse():
            raise ValueError(f"{_shown(member)} is a sparse member; write the tar without --sparse")
        assert self._file is not None
        self._file.seek(member.offset_data)
        try:
            content = self._file.read(member.size, limit=limit)
        except OSError as error:
            raise ValueError(f"{_shown(member)} cannot be read: {error}") from error
        if len(content) != member.size:
            raise ValueError(f"{_shown(member)} is cut off after {len(content):,} bytes")
        return content

    def _members(self) -> Iterator[tarfile.TarInfo]:
        self._file = self._stack.enter_context(_BoundedFile(io.FileIO(self._path)))
        _refuse_compression(self._file)
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            reached = -1
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                if member.size < 0 or member.offset <= reached:
                    raise ValueError(f"the header of {_shown(member)} gives an impossible size")
                reached = member.offset
                if member.isreg():
                    yield member
            # tarfile takes a header it cannot read for the end, which is a block of zeros.
            self._file.seek(tar.offset)
            if self._file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"the header at byte {tar.offset} is damaged")


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
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"it is compressed with {name}; videos gain nothing by it, and what it unpacks to "
                "has no bounds: write it uncompressed"
            )


def _split(name: str) -> tuple[str | None, str]:
    found = _NAME.fullmatch(name.removeprefix("./"))
    return (found[1], found[2].lower()) if found else (None, "")


def _shown(member: tarfile.TarInfo) -> str:
    return repr(member.name if len(member.name) <= 80 else f"{member.name[:79]}…")
