"""Webdataset tars: intact, truncated, damaged, compressed and malicious."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from stages.clips import (
    BadRecord,
    ClipRecord,
    load_clip,
    open_dataset,
)
from stages.clips.video.streams import open_source


def content(record):
    with open_source(record.video) as source:
        return source.read()


def test_a_tar_gives_records_with_captions_and_prompts(video, tools, config, tmp_path):
    mask = np.zeros((32, 48), np.uint8)
    mask[4:20, 8:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tools.write_tar(
        tmp_path / "00000.tar",
        [
            ("a.mp4", video),
            ("a.txt", b" A dog.\n"),
            ("a.mask.png", (tmp_path / "mask.png").read_bytes()),
            ("./b.json", json.dumps({"caption": "Ein Bär.", "box_xyxy": [1, 2, 9, 9]}).encode()),
            ("./b.MP4", video),
            ("deep/c.json", b'{"points": [[3, 4]]}'),
            ("deep/c.mp4", video),
            ("deep/c.joints.json", b"not read"),
        ],
    )
    records = tools.by_key(tools.read_all(config()))
    assert list(records) == ["00000/a", "00000/b", "00000/deep/c"]
    assert [record.caption for record in records.values()] == ["A dog.", "Ein Bär.", None]
    assert [record.prompts[0].kind for record in records.values()] == ["mask", "box", "points"]
    clip = load_clip(records["00000/a"], config())
    assert np.array_equal(clip.prompts[0].mask_HW, mask > 0)


def test_a_tar_gives_several_subjects_and_those_of_the_last_frame(video, tools, config, tmp_path):
    pngs = []
    for index in range(11):
        mask = np.zeros((32, 48), np.uint8)
        mask[index] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        pngs.append((tmp_path / "mask.png").read_bytes())
    fields = {
        "subject": " two dogs ",
        "subjects": [{"box_xyxy": [0, 0, 9, 9]}, {"points": [[3, 4]]}],
        "last_frame": {"box_xyxy": [5, 5, 20, 20]},
    }
    tools.write_tar(
        tmp_path / "t.tar",
        [
            ("a.mp4", video),
            # In number order, not in that of their names.
            *((f"a.mask.{index}.png", pngs[index]) for index in (10, 9, 2)),
            ("a.last.mask.1.png", pngs[1]),
            ("a.LAST.mask.0.PNG", pngs[0]),
            ("b.mp4", video),
            ("b.json", json.dumps(fields).encode()),
            ("c.mp4", video),
            ("c.last.mask.png", pngs[3]),
            ("c.json", json.dumps(fields | {"subjects": None}).encode()),
            ("d.mp4", video),
            ("d.mask.png", pngs[0]),
            ("d.json", json.dumps(fields).encode()),
        ],
    )
    records = tools.by_key(tools.read_all(config()))
    rows = [int(prompt.mask_HW.any(axis=1).argmax()) for prompt in records["t/a"].prompts]
    assert rows == [2, 9, 10]
    last = [int(p.mask_HW.any(axis=1).argmax()) for p in records["t/a"].last_frame_prompts]
    assert last == [0, 1] and records["t/a"].phrase is None
    numbers = [prompt.number for prompt in records["t/a"].prompts]
    assert numbers == [2, 9, 10]
    assert [prompt.number for prompt in records["t/a"].last_frame_prompts] == [0, 1]
    assert [prompt.kind for prompt in records["t/b"].prompts] == ["box", "points"]
    assert records["t/b"].last_frame_prompts[0].box_xyxy == (5.0, 5.0, 20.0, 20.0)
    assert records["t/b"].last_frame_prompts[0].number is None  # which of the two it is
    assert records["t/b"].phrase == "two dogs"
    assert records["t/c"].prompts == ()
    assert [prompt.kind for prompt in records["t/c"].last_frame_prompts] == ["mask"]
    assert records["t/d"].reason == "bad_prompt" and "both given" in records["t/d"].detail


def test_members_are_grouped_as_webdataset_groups_them(video, tools, config, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    names = ["a.mp4", "a.b.txt", "x/a.mp4", "x.y/a.c.mp4", ".hidden.mp4", "a", "z.MP4"]
    path = tools.write_tar(tmp_path / "t.tar", [(name, video) for name in names])
    reference = webdataset.WebDataset(str(path), shardshuffle=False)
    assert [record.key for record in tools.read_all(config())] == [
        f"t/{sample['__key__']}" for sample in reference
    ]


def test_members_of_a_clip_may_lie_anywhere_in_a_tar(tools, config, tmp_path):
    """As `tar c` without `--sort=name` and a Mac's tar write them."""
    videos = [tools.encode(tools.counting_frames(9 + index)) for index in range(3)]
    captions = [(f"clips/{index}.txt", b"clip %d" % index) for index in (2, 0, 1)]
    clips = [(f"clips/{index}.mp4", video) for index, video in enumerate(videos)]
    hidden = [
        (name, b"not read")
        for index in range(3)
        for name in (f"clips/._{index}.mp4", f"__MACOSX/clips/{index}.mp4", "clips/.DS_Store")
    ]
    members = [*captions[:2], *hidden[:4], *clips, *hidden[4:], captions[2]]
    tools.write_tar(tmp_path / "t.tar", members)
    records = tools.read_all(config())
    assert [record.key for record in records] == ["t/clips/2", "t/clips/0", "t/clips/1"]
    assert [record.caption for record in records] == ["clip 2", "clip 0", "clip 1"]
    assert [content(record) for record in records] == [videos[2], videos[0], videos[1]]
    assert open_dataset(config()).shards[0].num_clips() == 3


def test_a_torn_tar_of_mixed_members_gives_no_clip_that_may_lack_some(
    video, tools, config, tmp_path
):
    members = [("a.mp4", video), ("b.mp4", video), ("a.txt", b"A dog."), ("b.txt", b"A cat.")]
    path = tools.write_tar(tmp_path / "t.tar", members)
    path.write_bytes(path.read_bytes()[: 2 * (512 + 512 * -(-len(video) // 512)) + 1024 + 100])
    records = tools.read_all(config())
    assert [record.reason for record in records] == ["bad_record"] * 2
    assert "--sort=name" in records[1].detail


def test_a_blank_text_file_leaves_the_caption_to_the_json(video, tools, config, tmp_path):
    tools.write_tar(
        tmp_path / "t.tar",
        [
            ("a.mp4", video),
            ("a.txt", b" \n"),
            ("a.json", b'{"caption": "A dog."}'),
            ("b.mp4", video),
            ("b.txt", b""),
        ],
    )
    assert [record.caption for record in tools.read_all(config())] == ["A dog.", None]


def test_a_torn_tar_gives_its_readable_part_and_a_bad_record(video, tools, config, tmp_path):
    path = tools.write_tar(tmp_path / "t.tar", [(f"{name}.mp4", video) for name in "abc"])
    start_of_c = 2 * (512 + 512 * -(-len(video) // 512))
    path.write_bytes(path.read_bytes()[: start_of_c + 600])
    records = tools.read_all(config())
    assert [type(record) for record in records] == [ClipRecord, ClipRecord, BadRecord]
    assert records[2].key == "t/c" and "cannot be read" in records[2].detail
    assert open_dataset(config()).shards[0].num_clips() == 3
    path.write_bytes(path.read_bytes()[: start_of_c + 100])
    records = tools.read_all(config())
    assert [type(record) for record in records] == [ClipRecord, BadRecord]
    # The header after b is unreadable, and might have been its caption's or mask's.
    assert records[1].key == "t/b" and "cannot be read" in records[1].detail
    path.write_bytes(b"no tar at all" * 100)
    assert [record.reason for record in tools.read_all(config())] == ["bad_record"]
    assert open_dataset(config()).shards[0].num_clips() == 1


def tar_bytes(*members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
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
        ["works", "bad_record"],
        "unexpected end of data",
    ),
    "damaged header": (with_damaged_header, ["bad_record"], "is damaged"),
    "negative size": (with_negative_size, ["bad_record"], "cannot be read"),
    "headers without end": (with_endless_headers, ["bad_record"], "recursion"),
    "giant header": (with_giant_header, ["bad_record"], "header claims"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_is_recorded_and_its_neighbours_are_read(video, name, tools, config, tmp_path):
    make, reasons, words = BAD_TARS[name]
    for shard in ("0", "2"):
        tools.write_tar(tmp_path / f"{shard}.tar", [("x.mp4", video), ("x.txt", shard.encode())])
    (tmp_path / "1.tar").write_bytes(make(video))
    found = list(tools.outcomes(config()))
    assert found[0] == ("x", "works", "0") and found[-1] == ("x", "works", "2")
    assert [reason for _, reason, _ in found[1:-1]] == reasons
    assert words in found[-2][2]
    assert open_dataset(config()).shards[1].num_clips() == len(reasons)
