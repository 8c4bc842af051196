"""Every sort of bad input between two good clips of one real tar: what becomes of it is recorded,
and its neighbours are read as if it were not there."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stages.clips import BadRecord, ClipsConfig, ClipSkipped, load_clip, open_dataset

Member = tuple[str | tarfile.TarInfo, bytes]
GOOD = "works"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Members between two good clips, and what each key is expected to become."""

    members: Callable[[Any], list[Member]]
    outcomes: dict[str, str]
    """Reason by key, or GOOD; keys without the shard's name."""
    words: str = ""
    """Part of the detail."""
    config: dict[str, Any] = field(default_factory=dict)


def one(make: Callable[[Any], bytes], reason: str, words: str = "", **config: Any) -> Case:
    """A case of one video."""
    return Case(
        members=lambda tools: [("bad.mp4", make(tools))],
        outcomes={"bad": reason},
        words=words,
        config=config,
    )


def remuxed(video: bytes, container: str, *, title: str = "", **options: Any) -> bytes:
    """The same packets in a new file, whose title is in Latin-1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new"
        with (
            av.open(io.BytesIO(video)) as source,
            av.open(str(path), "w", format=container, metadata_encoding="latin-1", **options) as to,
        ):
            to.metadata["title"] = title
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        return path.read_bytes()


def faststart(tools: Any) -> bytes:
    """The index lies in front, so that a truncated file still opens."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    return remuxed(tools.encode(noise), "mp4", options={"movflags": "faststart"})


def without_frames(container: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as muxer:
        stream: Any = muxer.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        muxer.start_encoding()
    return out.getvalue()


def audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer:
        stream: Any = muxer.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        muxer.mux(stream.encode(sound))
        muxer.mux(stream.encode())
    return out.getvalue()


def uneven(tools: Any, container: str) -> bytes:
    times = [0, 20, 130, 140, 240, 260, 370, 380, 490, 520, 600, 640, 740, 760, 870, 880, 990, 1020]
    return tools.encode(
        tools.counting_frames(18), fps=16, container=container, times=times,
        options={"bf": "0"},
    )  # fmt: skip


def foreign_title(tools: Any) -> bytes:
    video = remuxed(tools.encode(tools.counting_frames(9)), "matroska", title="Bär")
    assert "Bär".encode("latin-1") in video
    return video


def changing_size(tools: Any) -> bytes:
    sizes = ((32, 48), (64, 96))
    return b"".join(
        tools.encode(tools.counting_frames(5, *size), container="mpegts", pix_fmt="yuv420p")
        for size in sizes
    )


def png(height: int, width: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height), 1).save(out, format="PNG")
    return out.getvalue()


def giant_frames(tools: Any) -> bytes:
    """A file whose header claims frames of 81 million pixels."""
    video = tools.encode(tools.counting_frames(9), codec="ffv1", pix_fmt="yuv444p", container="avi")
    return video.replace(struct.pack("<II", 48, 32), struct.pack("<II", 9_000, 9_000))


def hole(name: str, size: int) -> Member:
    """A member whose header claims `size` bytes, which `good_clips_around` leaves as a hole."""
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


CASES = {
    "truncated mp4": one(lambda t: t.encode(t.counting_frames(9))[:-200], "undecodable"),
    "truncated mp4 with its index in front": one(
        lambda t: faststart(t)[: len(faststart(t)) * 2 // 3], "too_short", "truncated"
    ),
    "empty file": one(lambda t: b"", "undecodable"),
    "zero frames in mp4": one(lambda t: without_frames("mp4"), "undecodable"),
    "zero frames in matroska": one(lambda t: without_frames("matroska"), "undecodable"),
    "audio only": one(lambda t: audio_only(), "undecodable", "no video stream"),
    "variable frame rate in matroska": one(lambda t: uneven(t, "matroska"), GOOD),
    "variable frame rate in mp4": one(lambda t: uneven(t, "mp4"), GOOD),
    "matroska named mp4": one(lambda t: t.encode(t.counting_frames(9), container="matroska"), GOOD),
    "mp4 named avi": Case(
        members=lambda t: [("bad.avi", t.encode(t.counting_frames(9)))], outcomes={"bad": GOOD}
    ),
    "text named mp4": one(lambda t: b"a caption", "undecodable", "cannot be opened"),
    "playlist named mp4": one(
        lambda t: b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n", "undecodable", "cannot be opened"
    ),
    "picture named mp4": one(lambda t: png(32, 48), "undecodable", "cannot be opened"),
    "video named txt": Case(
        members=lambda t: [("bad.txt", t.encode(t.counting_frames(9)))],
        outcomes={"bad": "bad_record"},
        words="expected one video",
    ),
    "frames of one pixel": one(
        lambda t: t.encode(
            t.counting_frames(9, 1, 1), codec="ffv1", pix_fmt="yuv444p", container="matroska"
        ),
        GOOD,
    ),
    "odd sizes": one(lambda t: t.encode(t.counting_frames(9, 33, 51)), GOOD),
    "grayscale": one(lambda t: t.encode(t.counting_frames(9), pix_fmt="gray"), GOOD),
    "10 bit": one(lambda t: t.encode(t.counting_frames(9), pix_fmt="yuv420p10le"), GOOD),
    "rotated by metadata": one(lambda t: t.encode(t.counting_frames(9), rotation=90), GOOD),
    "40 frames where 49 are asked for": one(
        lambda t: t.encode(t.counting_frames(40)), "too_short", "40 frames", num_frames=49
    ),
    "fewer frames a second than asked for": one(
        lambda t: t.encode(t.counting_frames(9), fps=5), "fps_too_low", "5.000"
    ),
    "frames that change size": one(changing_size, "undecodable", "change size", fps=None),
    "a codec that nobody knows": one(
        lambda t: t.encode(t.counting_frames(9)).replace(b"avc1", b"zzzz"), "undecodable"
    ),
    "title in another encoding": one(foreign_title, GOOD),
    "giant frames": one(giant_frames, "undecodable", "9000x9000"),
    "caption that is not UTF-8": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.txt", "Bär".encode("latin-1")),
        ],
        outcomes={"bad": "bad_record"},
        words="not UTF-8",
    ),
    "JSON that is not UTF-8": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.json", '{"caption": "Bär"}'.encode("latin-1")),
        ],
        outcomes={"bad": "bad_record"},
        words="UTF-8",
    ),
    "JSON nested without end": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.json", b"[" * 200_000),
        ],
        outcomes={"bad": "bad_record"},
    ),
    "malformed subjects": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.json", json.dumps({"subjects": [{"box_xyxy": [9, 9, 1, 1]}]}).encode()),
        ],
        outcomes={"bad": "bad_prompt"},
        words="x0 < x1",
    ),
    "giant mask": Case(
        members=lambda t: [
            ("bad.mask.png", png(20_000, 4_000)),
            ("bad.mp4", t.encode(t.counting_frames(9))),
        ],
        outcomes={"bad": "bad_prompt"},
        words="4000x20000",
    ),
    "numbered and unnumbered masks": Case(
        members=lambda t: [
            ("bad.mask.0.png", png(32, 48)),
            ("bad.mask.png", png(32, 48)),
            ("bad.mp4", t.encode(t.counting_frames(9))),
        ],
        outcomes={"bad": "bad_prompt"},
        words="numbered and unnumbered masks",
    ),
    "absolute names": Case(
        members=lambda t: [("/etc/bad.mp4", t.encode(t.counting_frames(9)))],
        outcomes={"/etc/bad": GOOD},
    ),
    "names that climb": Case(
        members=lambda t: [("../../bad.mp4", t.encode(t.counting_frames(9)))],
        outcomes={"t\\x2f..\\x2f..\\x2fbad (2)": "bad_record"},
        words="has '..' between slashes",
    ),
    "names with control characters": Case(
        members=lambda t: [("ba\nd.mp4", t.encode(t.counting_frames(9)))],
        outcomes={"ba\\x0ad (2)": "bad_record"},
        words="control characters",
    ),
    "duplicate keys": Case(
        members=lambda t: [
            ("first.mp4", t.encode(t.counting_frames(9))),
            ("other.mp4", t.encode(t.counting_frames(9))),
            ("first.mp4", t.encode(t.counting_frames(9))),
        ],
        outcomes={"first": "bad_record", "other": GOOD},
        words="contains first.mp4 twice",
    ),
    "a hard link to a member": Case(
        members=lambda t: [
            ("first.mp4", t.encode(t.counting_frames(9))),
            ("first.txt", b"a dog"),
            link(tarfile.LNKTYPE, "bad.mp4", "first.mp4"),
            link(tarfile.LNKTYPE, "bad.txt", "first.txt"),
        ],
        outcomes={"first": GOOD, "bad": GOOD},
    ),
    "a hard link to what the tar lacks": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            link(tarfile.LNKTYPE, "bad.txt", "captions/bad.txt"),
        ],
        outcomes={"bad": "bad_record"},
        words="hard link to 'captions/bad.txt', which does not precede it",
    ),
    "a symbolic link": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            link(tarfile.SYMTYPE, "bad.txt", "before.txt"),
        ],
        outcomes={"bad": "bad_record"},
        words="--dereference",
    ),
    "a field given twice": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.json", b'{"caption": "a dog", "caption": "a cat"}'),
        ],
        outcomes={"bad": "bad_record"},
        words="'caption' is given twice",
    ),
    "a name with a dot before the suffix": Case(
        members=lambda t: [("bad.v2.mp4", t.encode(t.counting_frames(9)))],
        outcomes={"bad": "bad_record"},
        words="key ends at the first dot",
    ),
    "two masks of one number": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.mask.1.png", png(32, 48)),
            ("bad.mask.01.png", png(32, 48)),
        ],
        outcomes={"bad": "bad_prompt"},
        words="two masks have the same number",
    ),
    "a video of 2 GiB of zeros": Case(
        members=lambda t: [hole("bad.mp4", 2 << 30)],
        outcomes={"bad": "undecodable"},
        words="cannot be opened as video",
    ),
    "a caption over the limit": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            hole("bad.txt", 1 << 30),
        ],
        outcomes={"bad": "bad_record"},
        words="the limit is 65,536",
    ),
    "JSON over the limit": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            hole("bad.json", 1 << 30),
        ],
        outcomes={"bad": "bad_record"},
        words="the limit is 16,777,216",
    ),
    "a caption in JSON over the limit": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.json", json.dumps({"caption": "dog " * 20_000}).encode()),
        ],
        outcomes={"bad": "bad_record"},
        words="80,000 bytes; the limit is 65,536",
    ),
    "points without end": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            ("bad.json", json.dumps({"points": [[1, 1]] * 2000}).encode()),
        ],
        outcomes={"bad": "bad_prompt"},
        words="2000 points; the limit is 1024",
    ),
    "a mask over the limit": Case(
        members=lambda t: [
            hole("bad.mask.png", 1 << 30),
            ("bad.mp4", t.encode(t.counting_frames(9))),
        ],
        outcomes={"bad": "bad_prompt"},
        words="the limit is 67,108,864",
    ),
    "a member nobody reads over the limit": Case(
        members=lambda t: [
            ("bad.mp4", t.encode(t.counting_frames(9))),
            hole("bad.depth", 20 << 30),
        ],
        outcomes={"bad": GOOD},
    ),
    "an old sparse member of a huge size": Case(
        members=lambda t: [old_sparse("bad.mp4", 1 << 40)],
        outcomes={"bad": "bad_record"},
        words="is a sparse member",
    ),
    "a PAX sparse member of a huge size": Case(
        members=lambda t: [pax_sparse("bad.mp4", 1 << 40)],
        outcomes={"bad": "bad_record"},
        words="is a sparse member",
    ),
    "an old sparse member": Case(
        members=lambda t: [old_sparse("bad.mp4", 1 << 20)],
        outcomes={"bad": "bad_record"},
        words="--sparse",
    ),
    "a PAX sparse member": Case(
        members=lambda t: [pax_sparse("bad.mp4", 1 << 20)],
        outcomes={"bad": "bad_record"},
        words="--sparse",
    ),
}


def good_clips_around(path: Path, video: bytes, members: list[Member]) -> None:
    good = [
        [(f"{name}.mp4", video), (f"{name}.txt", name.encode())] for name in ("before", "after")
    ]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in [*good[0], *members, *good[1]]:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            if isinstance(name, str):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if content else None)
            if member.size and not content:  # a hole: takes no room on the disk
                tar.offset += -(-member.size // 512) * 512
                tar.fileobj.seek(tar.offset)


def outcomes(config: ClipsConfig) -> Iterator[tuple[str, str, str]]:
    """Key, reason or GOOD, and detail (the caption of a good one) of every record."""
    for shard in open_dataset(config).shards:
        for record in shard.records():
            key = record.key.removeprefix(f"{shard.name}/")
            if isinstance(record, BadRecord):
                yield key, record.reason, record.detail
                continue
            try:
                clip = load_clip(record, config)
            except ClipSkipped as skipped:
                yield key, skipped.reason, skipped.detail
            else:
                assert clip.frames_THWC.shape == (config.num_frames, 32, 48, 3)
                yield key, GOOD, record.caption or ""


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_recorded_and_its_neighbours_are_read(name, tools, config, tmp_path):
    case = CASES[name]
    clips = config(**case.config)
    good = tools.encode(tools.counting_frames(clips.num_frames))
    (tmp_path / "data").mkdir()
    clips = clips.model_copy(update={"path": tmp_path / "data"})
    good_clips_around(tmp_path / "data" / "t.tar", good, case.members(tools))
    found = list(outcomes(clips))
    assert found[0] == ("before", GOOD, "before") and found[-1] == ("after", GOOD, "after")
    assert {key: reason for key, reason, _ in found[1:-1]} == case.outcomes
    bad = [detail for _, reason, detail in found[1:-1] if reason != GOOD]
    assert all(case.words in detail and detail for detail in bad), bad
    assert open_dataset(clips).shards[0].num_clips() == len(found)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["data", "t.tar"]


def test_frames_that_grow_over_the_limit_are_refused_by_the_decoder(tools, config, monkeypatch):
    monkeypatch.setattr("stages.clips.video.streams.MAX_FRAME_PIXELS", 32 * 48)
    with pytest.raises(ClipSkipped, match="decoding failed") as caught:
        load_clip(tools.record_of(changing_size(tools)), config(fps=None))
    assert caught.value.reason == "undecodable"


def test_a_source_without_end_is_given_up(tools, config, monkeypatch):
    monkeypatch.setattr("stages.clips.loading.MAX_DECODED_FRAMES", 20)
    video = tools.encode(tools.counting_frames(40), fps=24)
    with pytest.raises(ClipSkipped, match="first 20 frames") as caught:
        load_clip(tools.record_of(video), config())
    assert caught.value.reason == "undecodable"
    assert len(load_clip(tools.record_of(video), config(fps=12)).frames_THWC) == 9


def tar_bytes(*members: Member, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def end_of_first(video: bytes) -> int:
    """Where the header after that of `tar_bytes`' first video starts."""
    return 512 + -(-len(video) // 512) * 512


def with_damaged_header(video: bytes) -> bytes:
    whole = bytearray(tar_bytes(("a.mp4", video), ("b.mp4", video), ("c.mp4", video)))
    whole[end_of_first(video) + 150] ^= 0xFF  # in the checksum of b's header
    return bytes(whole)


def with_negative_size(video: bytes) -> bytes:
    whole = bytearray(tar_bytes(("a.mp4", video), ("b.mp4", video)))
    header = end_of_first(video)
    whole[header + 124 : header + 136] = b"\xff" * 10 + b"\xf0\x00"  # -4096, back over a
    whole[header + 148 : header + 156] = b" " * 8
    whole[header + 148 : header + 156] = b"%06o\0 " % sum(whole[header : header + 512])
    return bytes(whole)


def with_endless_headers(video: bytes) -> bytes:
    header = tarfile.TarInfo.create_pax_global_header({"a": "b"})
    return tar_bytes(("a.mp4", video))[: end_of_first(video)] + header * 3000


def with_giant_header(video: bytes) -> bytes:
    return tar_bytes(("a.mp4", video), ("x" * (2 << 20) + ".mp4", video), ("c.mp4", video))


BAD_TARS: dict[str, tuple[Callable[[bytes], bytes], list[str], str]] = {
    "gzip": (lambda v: gzip.compress(tar_bytes(("a.mp4", v))), ["bad_record"], "gzip"),
    "bzip2": (lambda v: bz2.compress(tar_bytes(("a.mp4", v))), ["bad_record"], "bzip2"),
    "xz": (lambda v: lzma.compress(tar_bytes(("a.mp4", v))), ["bad_record"], "xz"),
    "no tar": (lambda v: b"no tar at all" * 100, ["bad_record"], "cannot be read"),
    "empty file": (lambda v: b"", ["bad_record"], "empty"),
    "video named tar": (lambda v: v, ["bad_record"], "cannot be read"),
    "cut in a video": (
        lambda v: tar_bytes(("a.mp4", v), ("b.mp4", v))[: end_of_first(v) + 600],
        [GOOD, "bad_record"],
        "unexpected end of data",
    ),
    "damaged header": (with_damaged_header, ["bad_record"], "is damaged"),
    "negative size": (with_negative_size, ["bad_record"], "cannot be read"),
    "headers without end": (with_endless_headers, ["bad_record"], "recursion"),
    "giant header": (with_giant_header, ["bad_record"], "header claims"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_is_recorded_and_its_neighbours_are_read(name, tools, config, tmp_path):
    make, reasons, words = BAD_TARS[name]
    video = tools.encode(tools.counting_frames(9))
    for shard in ("0", "2"):
        tools.write_tar(tmp_path / f"{shard}.tar", [("x.mp4", video), ("x.txt", shard.encode())])
    (tmp_path / "1.tar").write_bytes(make(video))
    found = list(outcomes(config()))
    assert found[0] == ("x", GOOD, "0") and found[-1] == ("x", GOOD, "2")
    assert [reason for _, reason, _ in found[1:-1]] == reasons
    assert words in found[-2][2]
    assert open_dataset(config()).shards[1].num_clips() == len(reasons)
