"""Clips listed in a metadata file."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from stages.clips import (
    ClipSkipped,
    load_clip,
    open_dataset,
)


def test_a_metadata_folder_is_cut_into_shards(video, tools, config, tmp_path):
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
    records = tools.by_key(tools.read_all(config(clips_per_shard=2)))
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
    records = tools.read_all(config())
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
    from_csv = tools.read_all(config())
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
    records = tools.read_all(config())
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
    records = list(tools.by_key(tools.read_all(config())).values())
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
    records = tools.read_all(config())
    tools.by_key(records)
    assert [getattr(record, "reason", None) for record in records] == (
        [None] + ["bad_record"] * 9 + ["bad_prompt"] * 2 + ["bad_record"]
    )
    assert records[0].video == tmp_path / "a.mp4"
    assert "line 10" in records[9].detail and "same key" in records[9].detail
