import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.clips import (
    BadRecord,
    ClipRecord,
    ClipSkipped,
    input_shard_name,
    load_clip,
    open_dataset,
    retry_shard_name,
)
from stages.clips.video.streams import open_source


def read_all(config) -> list:
    return [record for shard in open_dataset(config).shards for record in shard.records()]


def content(record):
    with open_source(record.video) as source:
        return source.read()


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


def test_a_tar_gives_several_subjects_and_those_of_the_last_frame(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
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
    records = by_key(read_all(config()))
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


def test_members_are_grouped_as_webdataset_groups_them(tools, config, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    names = ["a.mp4", "a.b.txt", "x/a.mp4", "x.y/a.c.mp4", ".hidden.mp4", "a", "z.MP4"]
    video = tools.encode(tools.counting_frames(9))
    path = tools.write_tar(tmp_path / "t.tar", [(name, video) for name in names])
    reference = webdataset.WebDataset(str(path), shardshuffle=False)
    assert [record.key for record in read_all(config())] == [
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
    records = read_all(config())
    assert [record.key for record in records] == ["t/clips/2", "t/clips/0", "t/clips/1"]
    assert [record.caption for record in records] == ["clip 2", "clip 0", "clip 1"]
    assert [content(record) for record in records] == [videos[2], videos[0], videos[1]]
    assert open_dataset(config()).shards[0].num_clips() == 3


def test_a_torn_tar_of_mixed_members_gives_no_clip_that_may_lack_some(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    members = [("a.mp4", video), ("b.mp4", video), ("a.txt", b"A dog."), ("b.txt", b"A cat.")]
    path = tools.write_tar(tmp_path / "t.tar", members)
    path.write_bytes(path.read_bytes()[: 2 * (512 + 512 * -(-len(video) // 512)) + 1024 + 100])
    records = read_all(config())
    assert [record.reason for record in records] == ["bad_record"] * 2
    assert "--sort=name" in records[1].detail


def test_a_blank_text_file_leaves_the_caption_to_the_json(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
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
    assert [record.caption for record in read_all(config())] == ["A dog.", None]


def test_store_shards_lead_back_to_the_dataset(tools, config, tmp_path):
    for name in ("a.tar", "b.tar", "a-retry1.tar"):
        tools.write_tar(tmp_path / name, [])
    dataset = open_dataset(config())
    names = [shard.name for shard in dataset.shards]
    assert {"a", "b"} < set(names)
    # The third would be taken for the retry of the first.
    assert retry_shard_name("a", 1) == "a-retry1" and "a-retry1" not in names
    for name in names:
        assert input_shard_name(name, dataset) == name
        assert input_shard_name(retry_shard_name(name, 12), dataset) == name
    for other in ("c", "c-retry1", "a-retry", "a-retryx", "-retry1", "a-retry1-retry2"):
        assert input_shard_name(other, dataset) is None


def test_shards_know_their_size(tools, config, tmp_path):
    video = tools.encode(tools.counting_frames(9))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.mp4").write_bytes(video)
    rows = [{"file_name": "a.mp4"}, {"file_name": "absent.mp4"}, b"{"]
    tools.write_jsonl(tmp_path / "rows", rows)
    (shard,) = open_dataset(config(path=tmp_path / "rows")).shards
    assert shard.num_bytes() == len(video)
    path = tools.write_tar(tmp_path / "t.tar", [("a.mp4", video)])
    (shard,) = open_dataset(config(path=path)).shards
    assert shard.num_bytes() == path.stat().st_size


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
        ],
    )
    records = by_key(read_all(config()))
    assert open_dataset(config()).shards[0].num_clips() == len(records) == 10
    good = records.pop("t/good")
    assert isinstance(good, ClipRecord) and good.caption is None
    reasons = {key: record.reason for key, record in records.items()}
    bad = ("latin", "no_video", "json", "list", "number", "two", "member")
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
    assert len(clips) == 1 and content(clips[0]) == video
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


def test_a_metadata_folder_gives_several_subjects(tools, config, tmp_path):
    Image.fromarray(np.full((32, 48), 255, np.uint8)).save(tmp_path / "m.png")
    subjects = [{"mask": "m.png"}, {"box_xyxy": [0, 0, 9, 9]}]
    last_frame = {"subjects": [{"mask": "m.png"}]}
    rows = [
        {"file_name": "a.mp4", "subjects": subjects, "last_frame": last_frame, "subject": "a dog"},
        {"file_name": "b.mp4", "subjects": subjects, "mask": "m.png"},
        {"file_name": "c.mp4", "last_frame": {"mask": "../m.png"}},
        {"file_name": "d.mp4", "subjects": [{"mask": 3}]},
    ]
    tools.write_jsonl(tmp_path, rows)
    records = read_all(config())
    assert [prompt.kind for prompt in records[0].prompts] == ["mask", "box"]
    assert [prompt.kind for prompt in records[0].last_frame_prompts] == ["mask"]
    assert records[0].phrase == "a dog"
    assert [record.reason for record in records[1:]] == ["bad_prompt"] * 3
    (tmp_path / "metadata.jsonl").unlink()
    cells = [json.dumps(cell).replace('"', '""') for cell in (subjects, last_frame)]
    (tmp_path / "metadata.csv").write_text(
        f'file_name,subject,subjects,last_frame,mask\na.mp4,a dog,"{cells[0]}","{cells[1]}",\n'
        "b.mp4,,,,m.png\n"
    )
    from_csv = read_all(config())
    assert [prompt.kind for prompt in from_csv[0].prompts] == ["mask", "box"]
    assert [prompt.kind for prompt in from_csv[0].last_frame_prompts] == ["mask"]
    assert from_csv[0].phrase == "a dog"
    assert [prompt.kind for prompt in from_csv[1].prompts] == ["mask"]


def test_pipes_folders_and_giants_named_in_a_folder_are_not_read(tools, config, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with (tmp_path / "giant.png").open("wb") as giant:
        giant.truncate(1 << 40)
    rows = [
        {"file_name": "a.mp4", "mask": "pipe.png"},
        {"file_name": "b.mp4", "mask": "giant.png"},
        {"file_name": "pipe.mp4"},
        {"file_name": "folder.mp4"},
    ]
    tools.write_jsonl(tmp_path, rows)
    records = read_all(config())
    assert [record.reason for record in records[:2]] == ["bad_prompt"] * 2
    for record in records[2:]:
        with pytest.raises(ClipSkipped, match="undecodable"):
            load_clip(record, config())


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
    assert "line 10" in records[9].detail and "same key" in records[9].detail


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
