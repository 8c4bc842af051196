"""A dataset that changes under its cache: what is kept, extracted, refused and made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_schema import ShardWriter, StoreReader, verify_store
from cache_schema.maintenance.drop import drop_clips
from stages.clips import ClipsConfig, encode_video
from stages.config import BaseModelConfig
from stages.dry_run.extract import Estimate, estimate
from stages.extract_features.config import ExtractConfig
from stages.extract_features.execution import refresh
from stages.extract_features.run import extract_features
from stages.extract_features.summary import ExtractSummary
from stages.progress import SilentProgress
from tests.stages.conftest import ellipse, make_frames

NUM_CLIPS = 8


class Dataset:
    """A folder with metadata.jsonl, three clips a shard, and the cache made from it."""

    def __init__(
        self, root: Path, videos: list[bytes], config: ExtractConfig, base: BaseModelConfig
    ) -> None:
        self.folder = root / "data"
        self.cache = root / "cache"
        self.videos = videos
        self.config = config
        self.base = base
        self.rows: list[dict[str, Any]] = []
        self.folder.mkdir()
        for number in range(NUM_CLIPS):
            self.append(number)

    def append(self, number: int, *, place: int | None = None) -> None:
        row = {"file_name": f"clip{number}.mp4", "caption": f"an ellipse drifts, take {number}"}
        (self.folder / row["file_name"]).write_bytes(self.videos[number % len(self.videos)])
        self.rows.insert(len(self.rows) if place is None else place, row)
        self.write()

    def write(self) -> None:
        lines = "".join(f"{json.dumps(row)}\n" for row in self.rows)
        (self.folder / "metadata.jsonl").write_text(lines)

    @property
    def clips(self) -> ClipsConfig:
        return ClipsConfig(
            path=self.folder, num_frames=9, height=64, width=96, fps=8.0, clips_per_shard=3
        )

    def extract(self, **options: Any) -> ExtractSummary:
        return extract_features(
            self.config,
            self.clips,
            self.base,
            self.cache,
            provenance={},
            progress=SilentProgress(),
            **options,
        )

    def estimate(self, **options: Any) -> Estimate:
        return estimate(
            self.config, self.clips, self.base, self.cache, progress=SilentProgress(), **options
        )

    def reader(self, kind: str) -> StoreReader:
        (store,) = self.cache.glob(f"{kind}-*")
        # What a run that is stopped leaves is harmless.
        assert {problem.remedy for problem in verify_store(store).problems} <= {"extract"}
        return StoreReader(store)

    def commits(self) -> dict[str, int]:
        return {
            str(path.relative_to(self.cache)): path.stat().st_mtime_ns
            for path in self.cache.glob("*/commits/*.json")
        }


def written(summary: ExtractSummary) -> dict[str, int]:
    return {kind.kind: kind.clips_written for kind in summary.kinds}


@pytest.fixture(scope="module")
def videos() -> list[bytes]:
    return [encode_video(make_frames(12, 64, 96, seed=number), 8.0) for number in range(3)]


@pytest.fixture
def dataset(
    extract_config: ExtractConfig,
    tiny_base: BaseModelConfig,
    videos: list[bytes],
    tmp_path: Path,
    stub_tracking: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Dataset:
    metering = "stages.dry_run.extract.matmul_flops_per_second"
    monkeypatch.setattr(metering, lambda *_: 1e9)
    config = extract_config.model_copy(update={"kinds": ("text", "teacher")})
    return Dataset(tmp_path, videos, config, tiny_base)


def test_appended_rows_are_extracted_and_the_others_kept(
    dataset: Dataset, stub_tracking: Any
) -> None:
    dataset.extract()
    before = dataset.commits()
    stub_tracking.batches.clear()
    dataset.append(8)
    dry = dataset.estimate().kinds[0]
    assert (dry.kind, dry.clips, dry.clips_already_there) == ("text", 1, 8)
    summary = dataset.extract()
    assert written(summary) == {"text": 1, "teacher": 1}
    assert [kind.clips_already_there for kind in summary.kinds] == [8, 8]
    assert stub_tracking.batches == [["clip8"]]
    after = dataset.commits()
    assert {name: after[name] for name in before} == before
    # The third shard had two clips and was finished, so the ninth is in a further one.
    assert dataset.reader("text").shard_of("clip8") == "00002-retry1"
    dataset.append(9)
    dataset.append(10)
    assert written(dataset.extract()) == {"text": 2, "teacher": 2}
    assert dataset.reader("teacher").shard_of("clip10") == "00003"
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}


def test_rows_reordered_or_inserted_change_nothing_else(
    dataset: Dataset, stub_tracking: Any
) -> None:
    dataset.extract()
    before = dataset.commits()
    dataset.rows.reverse()
    dataset.write()
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}
    assert dataset.commits() == before
    dataset.append(8, place=0)
    dataset.append(9, place=4)
    stub_tracking.batches.clear()
    assert written(dataset.extract()) == {"text": 2, "teacher": 2}
    assert sorted(key for batch in stub_tracking.batches for key in batch) == ["clip8", "clip9"]
    after = dataset.commits()
    assert {name: after[name] for name in before} == before
    assert len(dataset.reader("text")) == 10


def test_another_number_of_clips_a_shard_redoes_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.extract()
    before = dataset.commits()
    larger = dataset.clips.model_copy(update={"clips_per_shard": 2})
    monkeypatch.setattr(Dataset, "clips", larger)
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}
    assert dataset.commits() == before


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


def test_each_finished_shard_is_compared_by_one_process(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.extract()
    dataset.rows[4]["caption"] = "a square stands still"
    dataset.write()
    compared: list[list[str]] = []
    read = refresh.read_sources

    def noting(shards: Any, *rest: Any, **options: Any) -> Any:
        if "max_clips" not in options:
            compared.append([shard.name for shard in shards])
        return read(shards, *rest, **options)

    monkeypatch.setattr(refresh, "read_sources", noting)
    assert written(dataset.extract(rank=0, world_size=2)) == {"text": 0, "teacher": 0}
    with pytest.raises(ValueError, match=r"text of 1 .*'clip4'"):
        dataset.extract(rank=1, world_size=2)
    assert compared == [["00000", "00002"], ["00001"]]
    dataset.extract(rank=1, world_size=2, refresh_changed=True)
    assert dataset.reader("text").record("clip4").attributes["caption"] == "a square stands still"


def test_clips_that_moved_to_another_shard_have_not_left_the_dataset(dataset: Dataset) -> None:
    dataset.extract()
    dataset.rows.insert(1, dataset.rows.pop())
    first = dataset.rows.pop(0)
    for number in (8, 9, 10):
        dataset.append(number)
    dataset.rows.append(first)
    dataset.write()
    for rank in (0, 1):
        summary = dataset.extract(rank=rank, world_size=2)
        assert summary.notes == ()
    assert dataset.extract().notes == ()
    dataset.rows.remove(first)
    dataset.write()
    assert "1 clips of the store are not in the dataset ('clip0')" in dataset.extract().notes[0]
    notes = dataset.extract(rank=0, world_size=2).notes
    assert "in this process's share, one of 2) ('clip0')" in notes[0]
    assert dataset.extract(rank=1, world_size=2).notes == ()


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


def test_a_copy_with_other_times_is_the_same_dataset(dataset: Dataset, tmp_path: Path) -> None:
    dataset.extract()
    before = dataset.commits()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in dataset.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    dataset.folder = copy
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}
    assert dataset.commits() == before


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


def test_another_dataset_of_the_same_size_is_refused(dataset: Dataset, videos: list[bytes]) -> None:
    dataset.extract()
    before = dataset.commits()
    dataset.videos = videos[::-1]
    dataset.rows = []
    shutil.rmtree(dataset.folder)
    dataset.folder.mkdir()
    for number in range(NUM_CLIPS):
        dataset.append(number)
    with pytest.raises(ValueError, match="another dataset needs another cache folder"):
        dataset.extract()
    for number in range(NUM_CLIPS, NUM_CLIPS + 4):
        dataset.append(number)
    for row in dataset.rows:
        (dataset.folder / row["file_name"]).rename(dataset.folder / f"b-{row['file_name']}")
        row["file_name"] = f"b-{row['file_name']}"
    dataset.write()
    for run in (dataset.extract, dataset.estimate):
        with pytest.raises(ValueError, match=r"of another dataset.*another cache folder"):
            run(refresh_changed=True)
    assert dataset.commits() == before


def test_clips_that_left_the_dataset_are_told_and_kept(dataset: Dataset) -> None:
    dataset.extract()
    before = dataset.commits()
    gone = [dataset.rows.pop(2), dataset.rows.pop(5)]
    dataset.write()
    summary = dataset.extract()
    assert [kind.clips_already_there for kind in summary.kinds] == [6, 6]
    for kind, note in zip(("text", "teacher"), summary.notes, strict=True):
        assert note.startswith(f"{kind}: 2 clips of the store are not in the dataset")
        assert all(Path(row["file_name"]).stem in note for row in gone)
        assert "cache drop" in note and "train.leave_out" in note
    assert summary.notes[0] in dataset.estimate().notes
    assert dataset.commits() == before


def test_videos_that_cannot_be_read_now_keep_what_was_made_from_them(dataset: Dataset) -> None:
    dataset.extract()
    before = dataset.commits()
    (dataset.folder / "clip4.mp4").unlink()
    summary = dataset.extract(refresh_changed=True)
    assert written(summary) == {"text": 0, "teacher": 0}
    assert any("videos of 1 clips cannot be read now" in note for note in summary.notes)
    assert dataset.commits() == before


def test_a_skipped_clip_is_tried_again_when_its_source_changes_and_not_before(
    dataset: Dataset, stub_tracking: Any
) -> None:
    (dataset.folder / "clip5.mp4").write_bytes(b"no video")
    assert dataset.extract().kinds[1].skipped[0].key == "clip5"
    before = dataset.commits()
    assert written(dataset.extract()) == {"text": 0, "teacher": 0}
    assert dataset.commits() == before
    (dataset.folder / "clip5.mp4").write_bytes(dataset.videos[0])
    summary = dataset.extract()
    assert written(summary) == {"text": 0, "teacher": 1}
    assert summary.kinds[1].skipped == ()


def test_a_dropped_clip_stays_out_whatever_becomes_of_its_source(dataset: Dataset) -> None:
    dataset.extract()
    teacher = Path(dataset.reader("teacher").path)
    drop_clips(teacher, ["clip1"], detail="a bystander's face")
    (dataset.folder / "clip1.mp4").write_bytes(dataset.videos[0] + bytes(8))
    dataset.append(8, place=0)
    dataset.extract(retry_failed=True, refresh_changed=True)
    assert "clip1" not in dataset.reader("teacher")


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_refresh_that_is_stopped_is_finished_by_any_later_run(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    dataset.extract()
    expected = {key: dataset.reader("text").read(key)["embeds"] for key in ("clip0", "clip7")}
    dataset.rows[1]["caption"] = "a square stands still"
    dataset.rows[7]["caption"] = "a square stands still"
    dataset.write()
    add, added = ShardWriter.add, []

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
    add, added = ShardWriter.add, []

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
