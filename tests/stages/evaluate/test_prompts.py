"""Prompts of a run's held-out clips."""

import json

import numpy as np
import pytest
from PIL import Image

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from stages.clips import ClipsConfig, load_clip, open_dataset, write_video
from stages.evaluate.prompts import (
    held_out_prompts,
    with_seeds_of_their_own,
    write_first_frames,
)
from stages.sample_videos.requests import PromptRow, make_requests
from tests.fingerprints import fingerprint_of

TEXT = {"text": ArraySpec(dtype="float32", shape=(2, 3), dimension_names=("token", "channel"))}


@pytest.fixture
def text_store(tmp_path):
    writer = StoreWriter.open(
        tmp_path, StoreSettings(kind="text", arrays=TEXT, values={}), provenance={}
    )
    attributes = {
        "a": {"caption": "a dog"},
        "b": {"caption": "a cat"},
        "c": {},
        "d": {"caption": " "},
    }
    with writer.shard("00000", source="00000.tar") as shard:
        for key, of_clip in attributes.items():
            shard.add(
                key,
                {"text": np.zeros((2, 3), np.float32)},
                of_clip,
                fingerprint=fingerprint_of(key),
            )
        shard.commit()
    writer.write_index()
    return StoreReader(writer.path)


def test_captions_come_from_the_text_store_in_order(text_store):
    rows = held_out_prompts(["b", "a"], text_store)
    assert rows == [PromptRow(prompt="a cat"), PromptRow(prompt="a dog")]


@pytest.mark.parametrize("key", ["c", "d", "nowhere"])
def test_a_clip_without_a_caption_is_named(text_store, key):
    with pytest.raises(ValueError, match=f"no caption of the held-out clip '{key}'"):
        held_out_prompts(["a", key], text_store)


class TestFirstFrames:
    @pytest.fixture
    def clips(self, tmp_path, draw_frames):
        folder = tmp_path / "clips"
        names = ["one", "two", "three"]
        for number, name in enumerate(names):
            write_video(folder / f"{name}.mp4", draw_frames(9, 48, 64, seed=number), 8.0)
        write_video(folder / "short.mp4", draw_frames(3, 48, 64), 8.0)
        lines = [
            json.dumps({"file_name": f"{name}.mp4", "caption": name}) for name in (*names, "short")
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return ClipsConfig(path=folder, num_frames=9, height=32, width=48)

    def test_are_those_of_training(self, clips, tmp_path):
        keys = ["three", "one"]
        images = write_first_frames(keys, clips, tmp_path / "images")
        (shard,) = open_dataset(clips).shards
        records = {record.key: record for record in shard.records()}
        for key, image in zip(keys, images, strict=True):
            with Image.open(image) as opened:
                frame_HWC = np.asarray(opened)
            assert (frame_HWC == load_clip(records[key], clips).frames_THWC[0]).all()

    def test_bring_the_masks_of_their_subjects(self, clips, tmp_path):
        mask_HW = np.zeros((48, 64), bool)
        mask_HW[9:21, 16:40] = True
        Image.fromarray(mask_HW).save(clips.path / "one.mask.png")
        lines = [
            {"file_name": "one.mp4", "caption": "one", "mask": "one.mask.png"},
            {"file_name": "two.mp4", "caption": "two", "box_xyxy": [8, 8, 40, 30]},
        ]
        (clips.path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write_first_frames(["two", "one"], clips, tmp_path / "images")
        names = {path.name for path in (tmp_path / "images").iterdir()}
        assert names == {"0000.png", "0001.png", "0001.mask.png"}
        # At 3/4, after 2 2/3 rows of the source that the crop loses at the top.
        with Image.open(tmp_path / "images" / "0001.mask.png") as opened:
            rows, columns = np.nonzero(np.asarray(opened))
        assert (columns.min(), columns.max()) == (12, 29)
        assert (rows.min(), rows.max()) == (5, 13)

    @pytest.mark.parametrize(
        ("key", "why"), [("nowhere", "it is not in the dataset"), ("short", "needs 9")]
    )
    def test_a_clip_without_one_is_named_with_its_reason(self, clips, tmp_path, key, why):
        with pytest.raises(ValueError, match=rf"1 of 2 held-out clips .*'{key}': .*{why}"):
            write_first_frames(["one", key], clips, tmp_path / "images")


def test_clips_of_one_caption_are_different_videos(tmp_path):
    rows = [PromptRow(prompt=text, image=tmp_path / f"{n}.png") for n, text in enumerate("aba")]
    numbered = with_seeds_of_their_own(rows, 5, 2)
    assert [row.seed for row in numbered] == [5, 5, 7]
    requests = make_requests(numbered, seeds=[5], num=2, image=None)
    assert len({(one.prompt, one.seed) for one in requests}) == len(requests) == 6
