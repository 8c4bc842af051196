"""Videos with caption and mask files beside them."""

import json
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from stages.clips import load_clip, open_dataset


def test_videos_with_captions_beside_them(fill, config, tools):
    root = fill(
        {
            "lion.mp4": "",
            "lion.txt": "A lion.",
            "deep/1.0 bear.mov": "",
            "deep/1.0 bear.json": '{"caption": "A bear.", "box_xyxy": [2, 3, 20, 30]}',
            "deep/blank.mp4": "",
            "deep/blank.TXT": " ",
            "deep/blank.json": '{"text": "A cat."}',
            "alone.MP4": "",
            "README.txt": "About.",
            "._lion.mp4": "x",
            ".DS_Store": "x",
            "__MACOSX/lion.mp4": "x",
        }
    )
    mask = np.zeros((32, 48), np.uint8)
    mask[4:20, 8:30] = 255
    Image.fromarray(mask).save(root / "lion.mask.png")
    Image.fromarray(mask).save(root / "lion.last.mask.0.png")
    dataset = open_dataset(config(path=root, clips_per_shard=3))
    assert dataset.layout == (
        "4 videos with captions beside them, 1 without; 1 .txt without a video of the same name: "
        "README.txt"
    )
    assert [shard.num_clips() for shard in dataset.shards] == [3, 1]
    records = {record.key: record for shard in dataset.shards for record in shard.records()}
    assert {key: record.caption for key, record in records.items()} == {
        "alone": None,
        "deep/1.0 bear": "A bear.",
        "deep/blank": "A cat.",
        "lion": "A lion.",
    }
    assert records["deep/1.0 bear"].prompts[0].box_xyxy == (2.0, 3.0, 20.0, 30.0)
    lion = load_clip(records["lion"], config())
    assert np.array_equal(lion.prompts[0].mask_HW, mask > 0)
    assert [prompt.kind for prompt in lion.last_frame_prompts] == ["mask"]
    assert (
        sum(shard.num_bytes() for shard in dataset.shards) == 4 * (root / "lion.mp4").stat().st_size
    )


def test_links_to_folders_are_followed_once(captions, fill, config):
    root = fill({"a.mp4": "", "a.txt": "A"})
    elsewhere = fill({"b.mp4": "", "b.txt": "B"}, folder="elsewhere")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked_again").symlink_to(elsewhere)
    (root / "circle").symlink_to(root)
    assert captions(config(path=root)) == {"a": "A", "linked/b": "B"}


def test_what_is_there_twice_beside_a_video_is_refused(fill, config):
    root = fill({"a.mp4": "", "a.mov": "", "a.txt": "A", "b.mp4": "", "b.txt": "B", "b.TXT": "C"})
    found = [
        record for shard in open_dataset(config(path=root)).shards for record in shard.records()
    ]
    assert [(record.key, record.reason) for record in found] == [
        ("a", "bad_record"),
        ("b", "bad_record"),
    ]
    assert "mov" in found[0].detail and "b.TXT" in found[1].detail


def test_any_number_of_files_beside_a_video_are_its_own(fill, config):
    masks = {f"a.mask.{number}.png": "x" for number in range(500)}
    root = fill({"a.mp4": "", "a.txt": "A", "a.b.mp4": "", "a.b.txt": "B"} | masks)
    records = [r for shard in open_dataset(config(path=root)).shards for r in shard.records()]
    assert [record.key for record in records] == ["a", "a.b"]
    assert "500 masks" in records[0].detail and records[1].caption == "B"


def test_a_folder_of_videos_takes_few_bytes_each(fill, config):
    count = 2000
    folder = fill(
        {f"clip-{number:08d}.{s}": "x" for number in range(count) for s in ("mp4", "txt")}
    )
    tracemalloc.start()
    shards = open_dataset(config(path=folder, clips_per_shard=count)).shards
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(shards[0].records())) == count
    assert kept < 150 * count and peak < 450 * count


def test_one_video_is_a_dataset(captions, fill, config):
    root = fill(
        {"lion.mp4": "", "lion.txt": "A lion.", "bear.mp4": "", "video.mp4": "", "video.txt": "V"}
    )
    assert captions(config(path=root / "lion.mp4")) == {"lion": "A lion."}
    assert captions(config(path=root)) == {"lion": "A lion.", "bear": None, "video": "V"}
    assert captions(config(path=root / "*.mp4")) == captions(config(path=root))
    assert captions(config(path=root / "{lion,video}.mp4")) == {"lion": "A lion.", "video": "V"}
    with pytest.raises(ValueError, match=r"no caption\. Expected bear.txt beside bear.mp4"):
        open_dataset(config(path=root / "bear.mp4"))


def test_videos_without_captions_say_what_is_lacking(captions, fill, config):
    root = fill({"deep/b.mp4": "", "deep/a.mp4": ""})
    with pytest.raises(ValueError) as told:
        open_dataset(config(path=root))
    assert "2 videos and no caption. Expected deep/a.txt beside deep/a.mp4" in str(told.value)
    example = json.loads(re.search(r"\{.*\}", str(told.value))[0])
    (root / "metadata.jsonl").write_text(json.dumps(example))
    assert captions(config(path=root)) == {"deep/a": "…"}
    (root / "metadata.jsonl").unlink()
    (root / "prompts.txt").write_text("A\nB\n")
    with pytest.raises(ValueError, match=r"beside prompts\.txt, a videos\.txt"):
        open_dataset(config(path=root))
