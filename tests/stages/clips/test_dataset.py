import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.clips import BadRecord, ClipRecord, load_clip, open_dataset


def read_all(config) -> list:
    return [record for shard in open_dataset(config).shards for record in shard.records()]


def by_key(records) -> dict:
    assert len({record.key for record in records}) == len(records), "keys must be unique"
    return {record.key: record for record in records}


def test_a_tar_gives_records_with_captions_and_prompts(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
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
    records = by_key(read_all(config()))
    assert list(records) == ["00000/a", "00000/b", "00000/deep/c"]
    assert [record.caption for record in records.values()] == ["A dog.", "Ein Bär.", None]
    assert [record.prompts[0].kind for record in records.values()] == ["mask", "box", "points"]
    clip = load_clip(records["00000/a"], config())
    assert np.array_equal(clip.prompts[0].mask_HW, mask > 0)


def test_shards_are_tars_in_order_with_safe_stable_unique_names(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    for name in ("b.tar", "a b.tar", "A.tar", "a.tar", "ünder.tar", "00.part.tar"):
        tools.write_tar(tmp_path / name, [("x.mp4", video)])
    shards = open_dataset(config()).shards
    names = [shard.name for shard in shards]
    assert [shard.source for shard in shards] == sorted(entry.name for entry in tmp_path.iterdir())
    assert "b" in names
    assert len({name.lower() for name in names}) == 6
    assert all(name.isascii() and name.replace("-", "").isalnum() for name in names)
    assert names == [shard.name for shard in open_dataset(config()).shards]
    assert len(by_key(read_all(config()))) == 6
    single = open_dataset(config(path=tmp_path / "b.tar")).shards
    assert [shard.name for shard in single] == ["b"]


def test_what_is_wrong_in_a_tar_is_told_clip_by_clip(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    tools.write_tar(
        tmp_path / "t.tar",
        [
            ("good.mp4", video),
            ("latin.mp4", video),
            ("latin.txt", "Bär".encode("latin-1")),
            ("no_video.txt", b"alone"),
            ("json.mp4", video),
            ("json.json", b"{"),
            ("list.mp4", video),
            ("list.json", b"[1]"),
            ("number.mp4", video),
            ("number.json", b'{"caption": 3}'),
            ("box.mp4", video),
            ("box.json", b'{"box_xyxy": [5, 5, 1, 1]}'),
            ("mask.mp4", video),
            ("mask.mask.png", b"x"),
            ("two.mp4", video),
            ("two.webm", video),
            ("member.mp4", video),
            ("member.mp4", video),
            ("good.mp4", video),
            ("good.txt", b"again"),
        ],
    )
    records = by_key(read_all(config()))
    assert open_dataset(config()).shards[0].num_clips() == len(records) == 11
    good = records.pop("t/good")
    assert isinstance(good, ClipRecord) and good.caption is None
    reasons = {key: record.reason for key, record in records.items()}
    bad = ("latin", "no_video", "json", "list", "number", "two", "member", "good (2)")
    assert reasons == {f"t/{key}": "bad_record" for key in bad} | {
        "t/box": "bad_prompt",
        "t/mask": "bad_prompt",
    }
    assert all(isinstance(record, BadRecord) and record.detail for record in records.values())


def test_member_names_never_touch_the_disk(tools, config, tmp_path, monkeypatch):
    video = tools.encode(tools.counting_frames(9))
    data = tmp_path / "data"
    data.mkdir()
    names = ["/etc/x.mp4", "../../escape.mp4", "a/../../b.mp4", "/abs.txt"]
    with tarfile.open(tools.write_tar(data / "t.tar", [(name, video) for name in names]), "a") as t:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    records = by_key(read_all(config(path=data)))
    clips = [record for record in records.values() if isinstance(record, ClipRecord)]
    assert len(clips) == 3 and all(record.video == video for record in clips)
    for record in clips:
        load_clip(record, config(path=data))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_torn_tar_gives_its_readable_part_and_a_bad_record(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    path = tools.write_tar(tmp_path / "t.tar", [(f"{name}.mp4", video) for name in "abc"])
    start_of_c = 2 * (512 + 512 * -(-len(video) // 512))
    path.write_bytes(path.read_bytes()[: start_of_c + 600])
    records = read_all(config())
    assert [type(record) for record in records] == [ClipRecord, ClipRecord, BadRecord]
    assert records[2].key == "t/c" and "cannot be read" in records[2].detail
    assert open_dataset(config()).shards[0].num_clips() == 3
    path.write_bytes(path.read_bytes()[: start_of_c + 100])
    records = read_all(config())
    assert [type(record) for record in records] == [ClipRecord, BadRecord]
    # The header after b is unreadable, and might have been its caption's or mask's.
    assert records[1].key == "t/b" and "cannot be read" in records[1].detail
    path.write_bytes(b"no tar at all" * 100)
    assert [record.reason for record in read_all(config())] == ["bad_record"]
    assert open_dataset(config()).shards[0].num_clips() == 1


def test_unusable_keys_become_bad_records_under_usable_ones(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    names = ["bell\x07.mp4", "k" * 1500 + ".mp4", "sur\udcffrogate.mp4", "snö.mp4"]
    tools.write_tar(tmp_path / "t.tar", [(name, video) for name in names])
    records = read_all(config())
    assert [type(record) for record in records] == [BadRecord] * 3 + [ClipRecord]
    assert records[3].key == "t/snö"
    for record in records:
        assert record.key.isprintable() and len(record.key.encode()) <= 1024


def test_a_metadata_folder_is_cut_into_shards(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    for index in range(5):
        (tmp_path / f"clip{index}.mp4").write_bytes(video)
    Image.fromarray(np.full((32, 48), 255, np.uint8)).save(tmp_path / "m.png")
    rows = [{"file_name": f"clip{index}.mp4", "caption": f"clip {index}"} for index in range(5)]
    rows[1]["box_xyxy"] = [1, 2, 30, 20]
    rows[2]["mask"] = "m.png"
    tools.write_jsonl(tmp_path, rows)
    shards = open_dataset(config(clips_per_shard=2)).shards
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    assert [shard.num_clips() for shard in shards] == [2, 2, 1]
    assert shards[1].source == "metadata.jsonl entries 2 to 3"
    records = by_key(read_all(config(clips_per_shard=2)))
    assert list(records) == [f"clip{index}" for index in range(5)]
    assert [load_clip(record, config()).caption for record in records.values()] == [
        f"clip {index}" for index in range(5)
    ]
    assert records["clip1"].prompts[0].kind == "box" and records["clip2"].prompts[0].kind == "mask"


def test_a_csv_says_the_same_as_jsonl(tools, config, tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "\ufefffile_name,caption,box_xyxy,points,point_labels\n"
        'a.mp4,"A dog, running\nfast.","[1, 2, 3, 4]",,\n'
        'sub/b.mov,,,"[[5, 6], [7, 8]]","[1, 0]"\n'
        "c.mp4,x,[1,,\n",
        encoding="utf-8",
    )
    with (tmp_path / "metadata.csv").open("ab") as file:
        file.write("d.mp4,Bär,,,\n".encode("latin-1"))
    records = list(by_key(read_all(config())).values())
    assert records[0].caption == "A dog, running\nfast."
    assert records[0].prompts[0].box_xyxy == (1.0, 2.0, 3.0, 4.0)
    assert records[1].key == "sub/b" and records[1].caption is None
    assert records[1].prompts[0].point_labels.tolist() == [1, 0]
    assert [record.reason for record in records[2:]] == ["bad_record", "bad_record"]


def test_bad_rows_of_a_metadata_file_are_told_row_by_row(tools, config, tmp_path):
    tools.write_jsonl(
        tmp_path,
        [
            {"file_name": "a.mp4"},
            b"{",
            b"[]",
            '{"file_name": "ä.mp4"}'.encode("latin-1"),
            {"caption": "nameless"},
            {"file_name": "../a.mp4"},
            {"file_name": "/etc/a.mp4"},
            {"file_name": "x\u0000.mp4"},
            {"file_name": 3},
            {"file_name": "./a.mp4"},
            {"file_name": "b.mp4", "mask": "../m.png"},
            {"file_name": "c.mp4", "mask": "absent.png"},
            {"file_name": "d.mp4", "caption": ["x"]},
            b"",
        ],
    )
    records = read_all(config())
    by_key(records)
    assert [getattr(record, "reason", None) for record in records] == (
        [None] + ["bad_record"] * 9 + ["bad_prompt"] * 2 + ["bad_record"]
    )
    assert records[0].video == tmp_path / "a.mp4"
    assert "line 10" in records[9].detail and "second" in records[9].detail


def test_wrong_places_say_what_is_expected(tools, config, tmp_path):
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(ValueError, match=r"metadata\.jsonl"):
            open_dataset(config(path=path))
    (tmp_path / "metadata.csv").write_text("name\nx\n")
    with pytest.raises(ValueError, match="file_name"):
        open_dataset(config())
    tools.write_jsonl(tmp_path, [{"file_name": "a.mp4"}])
    with pytest.raises(ValueError, match="several"):
        open_dataset(config())


def test_opening_a_dataset_opens_no_tar(config, tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"no tar")
    assert len(open_dataset(config()).shards) == 1
