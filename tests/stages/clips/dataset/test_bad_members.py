"""Bad members of a tar between two good clips: what becomes of them is recorded, and their
neighbours are read as if they were not there."""

import io
import json
import tarfile
from typing import Any

import pytest
from PIL import Image

Member = tuple[str | tarfile.TarInfo, bytes | None]
"""Name or header, and content; None is a good video."""


VIDEO: Member = ("bad.mp4", None)


def png(height: int, width: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height), 1).save(out, format="PNG")
    return out.getvalue()


def hole(name: str, size: int) -> Member:
    """A member whose header claims `size` bytes, which `between_good_clips` leaves as a hole."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member, b""


def link(kind: bytes, name: str, target: str) -> Member:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def old_sparse(name: str, size: int) -> Member:
    """GNU's sparse member: a few bytes that unpack to `size`."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    member.size = 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[482] = 0
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return _Raw(bytes(header)), bytes(512)


def pax_sparse(name: str, size: int) -> Member:
    member = tarfile.TarInfo(name)
    member.size = 512
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(size),
    }
    return member, b"1\n0\n0\n".ljust(512, b"\0")


class _Raw(tarfile.TarInfo):
    """A header given by its bytes."""

    def __init__(self, header: bytes) -> None:
        super().__init__("raw")
        self.size, self._header = 512, header

    def tobuf(self, *_: Any, **__: Any) -> bytes:
        return self._header


BESIDE_A_VIDEO: dict[str, tuple[list[Member], str, str]] = {
    # Members of the clip `bad` beside its video, what becomes of it, and part of the detail.
    "caption that is not UTF-8": (
        [("bad.txt", "Bär".encode("latin-1"))],
        "bad_record",
        "not UTF-8",
    ),
    "JSON that is not UTF-8": (
        [("bad.json", '{"caption": "Bär"}'.encode("latin-1"))],
        "bad_record",
        "UTF-8",
    ),
    "JSON cut short": ([("bad.json", b"{")], "bad_record", "not valid JSON"),
    "a JSON list": ([("bad.json", b"[1]")], "bad_record", "not a JSON object"),
    "a caption that is a number": (
        [("bad.json", b'{"caption": 3}')],
        "bad_record",
        "must be a string",
    ),
    "a mask that is no PNG": ([("bad.mask.png", b"x")], "bad_prompt", "not a PNG"),
    "two videos": ([("bad.webm", None)], "bad_record", "expected one video"),
    "JSON nested without end": ([("bad.json", b"[" * 200_000)], "bad_record", ""),
    "a field given twice": (
        [("bad.json", b'{"caption": "a dog", "caption": "a cat"}')],
        "bad_record",
        "'caption' is given twice",
    ),
    "malformed subjects": (
        [("bad.json", json.dumps({"subjects": [{"box_xyxy": [9, 9, 1, 1]}]}).encode())],
        "bad_prompt",
        "x0 < x1",
    ),
    "giant mask": ([("bad.mask.png", png(20_000, 4_000))], "bad_prompt", "4000x20000"),
    "numbered and unnumbered masks": (
        [("bad.mask.0.png", png(32, 48)), ("bad.mask.png", png(32, 48))],
        "bad_prompt",
        "numbered and unnumbered masks",
    ),
    "two masks of one number": (
        [("bad.mask.1.png", png(32, 48)), ("bad.mask.01.png", png(32, 48))],
        "bad_prompt",
        "two masks have the same number",
    ),
    "a hard link to what the tar lacks": (
        [link(tarfile.LNKTYPE, "bad.txt", "captions/bad.txt")],
        "bad_record",
        "hard link to 'captions/bad.txt', which does not precede it",
    ),
    "a symbolic link": (
        [link(tarfile.SYMTYPE, "bad.txt", "before.txt")],
        "bad_record",
        "--dereference",
    ),
    "a caption over the limit": ([hole("bad.txt", 1 << 30)], "bad_record", "the limit is 65,536"),
    "JSON over the limit": (
        [hole("bad.json", 1 << 30)],
        "bad_record",
        "the limit is 16,777,216",
    ),
    "a caption in JSON over the limit": (
        [("bad.json", json.dumps({"caption": "dog " * 20_000}).encode())],
        "bad_record",
        "80,000 bytes; the limit is 65,536",
    ),
    "points without end": (
        [("bad.json", json.dumps({"points": [[1, 1]] * 2000}).encode())],
        "bad_prompt",
        "2000 points; the limit is 1024",
    ),
    "a mask over the limit": (
        [hole("bad.mask.png", 1 << 30)],
        "bad_prompt",
        "the limit is 67,108,864",
    ),
    "a member nobody reads over the limit": ([hole("bad.depth", 20 << 30)], "works", ""),
}

MEMBERS: dict[str, tuple[list[Member], dict[str, str], str]] = {
    # Members, the reason by key, and part of the detail.
    "mp4 named avi": ([("bad.avi", None)], {"bad": "works"}, ""),
    "a caption alone": ([("bad.txt", b"alone")], {"bad": "bad_record"}, "expected one video"),
    "video named txt": ([("bad.txt", None)], {"bad": "bad_record"}, "expected one video"),
    "a name with a dot before the suffix": (
        [("bad.v2.mp4", None)],
        {"bad": "bad_record"},
        "key ends at the first dot",
    ),
    "absolute names": ([("/etc/bad.mp4", None)], {"/etc/bad": "works"}, ""),
    "names that climb": (
        [("../../bad.mp4", None)],
        {"t\\x2f..\\x2f..\\x2fbad (2)": "bad_record"},
        "has '..' between slashes",
    ),
    "names with control characters": (
        [("ba\nd.mp4", None)],
        {"ba\\x0ad (2)": "bad_record"},
        "control characters",
    ),
    "duplicate keys": (
        [("first.mp4", None), ("other.mp4", None), ("first.mp4", None)],
        {"first": "bad_record", "other": "works"},
        "contains first.mp4 twice",
    ),
    "a hard link to a member": (
        [
            ("first.mp4", None),
            ("first.txt", b"a dog"),
            link(tarfile.LNKTYPE, "bad.mp4", "first.mp4"),
            link(tarfile.LNKTYPE, "bad.txt", "first.txt"),
        ],
        {"first": "works", "bad": "works"},
        "",
    ),
    "a video of 2 GiB of zeros": (
        [hole("bad.mp4", 2 << 30)],
        {"bad": "undecodable"},
        "cannot be opened as video",
    ),
    "an old sparse member of a huge size": (
        [old_sparse("bad.mp4", 1 << 40)],
        {"bad": "bad_record"},
        "is a sparse member",
    ),
    "a PAX sparse member of a huge size": (
        [pax_sparse("bad.mp4", 1 << 40)],
        {"bad": "bad_record"},
        "is a sparse member",
    ),
    "an old sparse member": (
        [old_sparse("bad.mp4", 1 << 20)],
        {"bad": "bad_record"},
        "--sparse",
    ),
    "a PAX sparse member": (
        [pax_sparse("bad.mp4", 1 << 20)],
        {"bad": "bad_record"},
        "--sparse",
    ),
}
MEMBERS |= {
    name: ([VIDEO, *members], {"bad": reason}, words)
    for name, (members, reason, words) in BESIDE_A_VIDEO.items()
}


@pytest.mark.parametrize("name", MEMBERS)
def test_bad_members_are_recorded_and_their_neighbours_are_read(video, name, between_good_clips):
    members, reasons, words = MEMBERS[name]
    found = between_good_clips(
        [(name, video if content is None else content) for name, content in members]
    )
    assert {key: reason for key, reason, _ in found} == reasons
    bad = [detail for _, reason, detail in found if reason != "works"]
    assert all(words in detail and detail for detail in bad), bad
