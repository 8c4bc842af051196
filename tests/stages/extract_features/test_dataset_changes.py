"""Rows added, moved or removed in a dataset with an existing cache; other datasets."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cache_schema.maintenance.drop import drop_clips
from stages.extract_features.execution import refresh
from stages.extract_features.fingerprints import read_sources
from tests.stages.extract_features.changing_dataset import NUM_CLIPS, Dataset, written


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


def test_each_finished_shard_is_compared_by_one_process(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.extract()
    dataset.rows[4]["caption"] = "a square stands still"
    dataset.write()
    compared: list[list[str]] = []
    read = read_sources

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
