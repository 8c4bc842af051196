"""Clips whose source changed after extraction: refused, and extracted again on request."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_schema import ShardWriter
from stages.clips import ClipsConfig
from tests.stages.conftest import ellipse
from tests.stages.extract_features.changing_dataset import NUM_CLIPS, Dataset, written


def test_a_change_in_a_shard_whose_clips_are_in_others_is_made_again(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.extract()
    monkeypatch.setattr(Dataset, "clips", dataset.clips.model_copy(update={"clips_per_shard": 2}))
    dataset.rows[7]["caption"] = "a square stands still"
    dataset.write()
    with pytest.raises(ValueError, match=r"text of 1 .*'clip7'"):
        dataset.extract()
    assert written(dataset.extract(refresh_changed=True)) == {"text": 1, "teacher": 0}
    text = dataset.reader("text")
    assert text.record("clip7").attributes["caption"] == "a square stands still"
    assert text.shard_of("clip7") == "00003"


def test_captions_edited_in_place_are_refused_and_made_again_on_request(
    dataset: Dataset, stub_tracking: Any
) -> None:
    dataset.extract()
    teacher = dataset.commits()
    dataset.rows[1]["caption"] = "a square stands still"
    dataset.rows[6]["caption"] = "another square"
    dataset.write()
    before = dataset.commits()
    for options in ({}, {"retry_failed": True}):
        for run in (dataset.extract, dataset.estimate):
            with pytest.raises(
                ValueError, match=r"text of 2 \(another caption\): 'clip1', 'clip6'"
            ) as error:
                run(**options)
            assert "--refresh-changed" in str(error.value)
            assert "teacher" not in str(error.value)
    assert dataset.commits() == before
    dry = dataset.estimate(refresh_changed=True)
    assert (dry.kinds[0].clips, dry.kinds[0].clips_already_there) == (2, 6)
    stub_tracking.batches.clear()
    assert written(dataset.extract(refresh_changed=True)) == {"text": 2, "teacher": 0}
    assert stub_tracking.batches == []
    text = dataset.reader("text")
    assert text.record("clip1").attributes["caption"] == "a square stands still"
    assert len(text) == NUM_CLIPS
    assert text.skipped == ()
    assert {name: time for name, time in teacher.items() if "teacher" in name} == {
        name: time for name, time in dataset.commits().items() if "teacher" in name
    }
    before = dataset.commits()
    assert written(dataset.extract(refresh_changed=True)) == {"text": 0, "teacher": 0}
    assert dataset.commits() == before


def test_a_change_in_a_later_shard_is_refused_after_what_is_new_is_done(dataset: Dataset) -> None:
    dataset.extract()
    before = dataset.commits()
    dataset.rows[6]["caption"] = "a square stands still"
    for number in (8, 9, 10):
        dataset.append(number)
    with pytest.raises(ValueError, match=r"text of 1 \(another caption\): 'clip6'") as error:
        dataset.extract()
    assert "--refresh-changed" in str(error.value)
    new = {name: time for name, time in dataset.commits().items() if name not in before}
    assert {Path(name).name for name in new} == {"00003.json"}
    assert dataset.commits() == before | new
    assert written(dataset.extract(refresh_changed=True)) == {"text": 2, "teacher": 1}
    assert dataset.reader("text").record("clip6").attributes["caption"] == "a square stands still"
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}


@pytest.mark.parametrize("refused_first", [True, False])
def test_a_changed_clip_that_moved_to_an_unfinished_shard_is_found_out(
    dataset: Dataset, stub_tracking: Any, refused_first: bool
) -> None:
    dataset.extract()
    moved = dataset.rows.pop()
    for number in (8, 9, 10):
        dataset.append(number)
    dataset.rows.append(moved | {"caption": "a square stands still"})
    dataset.write()
    if refused_first:
        with pytest.raises(ValueError, match=r"text of 1 .*'clip7'"):
            dataset.extract()
        assert dataset.reader("text").shard_of("clip10") == "00003"
    dataset.extract(refresh_changed=True)
    text = dataset.reader("text")
    assert text.record("clip7").attributes["caption"] == "a square stands still"
    assert len(text) == len(dataset.reader("teacher")) == NUM_CLIPS + 3
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}


def test_a_video_replaced_under_its_name_is_found_out(dataset: Dataset, stub_tracking: Any) -> None:
    dataset.extract()
    old = dataset.reader("teacher").read("clip3")["mean"]
    embeds = dataset.reader("text").read("clip3")["embeds"]
    (dataset.folder / "clip3.mp4").write_bytes(dataset.videos[1])
    with pytest.raises(ValueError, match=r"teacher of 1 \(another video or prompt\): 'clip3'"):
        dataset.extract()
    stub_tracking.batches.clear()
    assert written(dataset.extract(refresh_changed=True)) == {"text": 0, "teacher": 1}
    assert stub_tracking.batches == [["clip3"]]
    assert (dataset.reader("teacher").read("clip3")["mean"] != old).any()
    # The text is the same, and belongs to the new video.
    text, teacher = dataset.reader("text"), dataset.reader("teacher")
    assert (text.read("clip3")["embeds"] == embeds).all()
    videos = [reader.record("clip3").fingerprint[16:] for reader in (text, teacher)]
    assert videos[0] == videos[1]
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}


def test_what_a_kind_does_not_read_does_not_concern_it(
    dataset: Dataset, stub_tracking: Any
) -> None:
    dataset.extract()
    for row in dataset.rows:
        row["caption"] += ", again"
        row["box_xyxy"] = [10, 10, 40, 40]
    dataset.write()
    dataset.config = dataset.config.model_copy(update={"kinds": ("text",)})
    with pytest.raises(ValueError, match="text of 8"):
        dataset.extract()
    dataset.config = dataset.config.model_copy(update={"kinds": ("latents",)})
    dataset.extract()
    before = dataset.commits()
    for row in dataset.rows:
        row["caption"] += ", and again"
    dataset.write()
    assert written(dataset.extract()) == {"latents": 0}
    assert dataset.commits() == before


def test_a_changed_prompt_is_the_teachers_alone(dataset: Dataset, stub_tracking: Any) -> None:
    mask = ellipse(64, 96).astype(np.uint8) * 255
    Image.fromarray(mask).save(dataset.folder / "mask.png")
    dataset.rows[2]["mask"] = "mask.png"
    dataset.write()
    dataset.extract()
    # The same pixels in another file, and words that the dataset's own prompt comes before.
    Image.fromarray(mask).save(dataset.folder / "mask.png", compress_level=0)
    dataset.rows[2]["subject"] = "an ellipse"
    dataset.write()
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}
    Image.fromarray(mask[::-1]).save(dataset.folder / "mask.png")
    with pytest.raises(ValueError, match="teacher of 1 ") as error:
        dataset.extract()
    assert "text" not in str(error.value)
    assert written(dataset.extract(refresh_changed=True)) == {"text": 0, "teacher": 1}


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_refresh_that_is_stopped_is_finished_by_any_later_run(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    dataset.extract()
    expected = {key: dataset.reader("text").read(key)["embeds"] for key in ("clip0", "clip7")}
    dataset.rows[1]["caption"] = "a square stands still"
    dataset.rows[7]["caption"] = "a square stands still"
    dataset.write()
    add = ShardWriter.add
    added: list[str] = []

    def stopping(self: Any, key: str, *rest: Any, **named: Any) -> None:
        if len(added) == stop_at:
            raise OSError("No space left on device")
        add(self, key, *rest, **named)
        added.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stopping)
        with pytest.raises(OSError, match="No space left"):
            dataset.extract(refresh_changed=True)
    # A shard of what was made before is finished.
    assert len(dataset.reader("text")) == NUM_CLIPS - 2 + stop_at
    dataset.extract()
    text = dataset.reader("text")
    assert list(text.keys) == [f"clip{n}" for n in range(NUM_CLIPS)]
    assert (text.read("clip0")["embeds"] == expected["clip0"]).all()
    assert (text.read("clip7")["embeds"] != expected["clip7"]).any()
    assert (text.read("clip7")["embeds"] == text.read("clip1")["embeds"]).all()


def test_staged_clips_whose_source_changed_are_not_adopted(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.config = dataset.config.model_copy(update={"kinds": ("text",)})
    add = ShardWriter.add
    added: list[str] = []

    def full(self: Any, key: str, *rest: Any, **named: Any) -> None:
        if len(added) == 2:
            raise OSError("No space left on device")
        add(self, key, *rest, **named)
        added.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(OSError, match="No space left"):
            dataset.extract()
    dataset.rows[1]["caption"] = "a square stands still"
    dataset.write()
    assert written(dataset.extract()) == {"text": NUM_CLIPS - 1}
    text = dataset.reader("text")
    assert text.record("clip1").attributes["caption"] == "a square stands still"
    assert text.record("clip0").attributes["caption"] == dataset.rows[0]["caption"]


def test_two_ranks_that_refresh_at_once_agree(dataset: Dataset) -> None:
    dataset.extract()
    dataset.rows[1]["caption"] = "a square stands still"
    dataset.write()
    first = dataset.extract(refresh_changed=True, rank=0, world_size=2)
    second = dataset.extract(refresh_changed=True, rank=1, world_size=2)
    assert written(first)["text"] + written(second)["text"] == 1


def test_a_tar_of_the_same_name_is_found_out(
    dataset: Dataset, two_shards: ClipsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copy(two_shards.path / "00000.tar", tars / "00000.tar")
    clips = two_shards.model_copy(update={"path": tars})
    monkeypatch.setattr(Dataset, "clips", clips)
    dataset.extract()
    shutil.copy(two_shards.path / "00001.tar", tars / "00001.tar")
    assert written(dataset.extract()) == {"text": 3, "teacher": 2}
    other = tmp_path / "other.tar"
    import tarfile

    with tarfile.open(tars / "00000.tar") as old, tarfile.open(other, "w") as new:
        members = {member.name: member for member in old}
        for name, member in members.items():
            source = members["clip001.mp4"] if name == "clip002.mp4" else member
            renamed = tarfile.TarInfo(name)
            renamed.size = source.size
            new.addfile(renamed, old.extractfile(source))
    other.replace(tars / "00000.tar")
    with pytest.raises(ValueError, match=r"teacher of 1 .*'00000/clip002'") as error:
        dataset.extract()
    assert "text of" not in str(error.value)
    assert written(dataset.extract(refresh_changed=True)) == {"text": 0, "teacher": 1}
