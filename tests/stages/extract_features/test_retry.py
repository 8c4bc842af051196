"""Retries of skipped clips go into new shards; finished shards are unchanged."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cache_schema import ShardWriter, StoreReader, verify_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.repair import repair_store
from cache_schema.names import retry_number
from stages.clips import ClipsConfig, retry_shard_name
from stages.extract_features.config import Kind
from stages.extract_features.execution.jobs import ShardJob, rank_order
from stages.extract_features.summary import ExtractSummary
from tests.stages.extract_features.conftest import Extract

LOST = "00000/clip001"
BAD = "00001/clip004"


class Road:
    """Runs stage one on one cache folder with the stub in SAM2's place."""

    def __init__(self, extract: Extract, clips: ClipsConfig, root: Path) -> None:
        self.extract = extract
        self.kinds: tuple[Kind, ...] = ("teacher", "masks")
        self.clips = clips
        self.root = root

    def run(self, **options: Any) -> ExtractSummary:
        return self.extract(self.root, clips=self.clips, kinds=self.kinds, **options)

    def commits(self) -> dict[str, int]:
        return {
            f"{path.parent.parent.name[:5]} {path.stem}": path.stat().st_mtime_ns
            for path in sorted(self.root.glob("*/commits/*.json"))
        }


@pytest.fixture
def road(extract: Extract, two_shards: ClipsConfig, tmp_path: Path, stub_tracking: Any) -> Road:
    return Road(extract, two_shards, tmp_path / "cache")


def test_names_of_retries_mean_the_same_to_the_driver_and_to_readers() -> None:
    assert [retry_number(retry_shard_name("00000", n)) for n in (1, 2, 17)] == [1, 2, 17]
    assert retry_number("00000") == 0


def test_what_now_succeeds_goes_into_a_further_shard(road: Road, stub_tracking: Any) -> None:
    stub_tracking.lost = {LOST}
    first = road.run()
    assert [[c.key for c in kind.skipped] for kind in first.kinds] == [[LOST, BAD]] * 2
    before = road.commits()
    stub_tracking.lost = set()
    stub_tracking.batches.clear()

    second = road.run(retry_failed=True)

    assert stub_tracking.batches == [[LOST]]
    after = road.commits()
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == [
        f"{kind} {shard}-retry1" for kind in ("masks", "teach") for shard in ("00000", "00001")
    ]
    for kind in second.kinds:
        assert (kind.clips_written, kind.clips_already_there) == (1, 4)
        assert [(c.key, c.shard) for c in kind.skipped] == [(BAD, "00001-retry1")]
        reader = StoreReader(kind.store)
        assert reader.record(LOST).shard == "00000-retry1"
        assert reader.record(LOST).source == "00000.tar, retry 1"
        assert verify_store(kind.store).problems == ()
    assert second.failures is not None
    assert second.failures.read_text().count(BAD) == 2
    assert LOST not in second.failures.read_text()


def test_without_the_request_and_without_a_failure_nothing_is_retried(
    road: Road, stub_tracking: Any
) -> None:
    road.run()
    before = road.commits()
    road.run()
    assert road.commits() == before
    road.kinds = ("text",)
    road.run()
    before = road.commits()
    road.run(retry_failed=True)
    assert road.commits() == before


def test_a_clip_that_was_dropped_comes_back_only_where_that_was_meant(
    road: Road, stub_tracking: Any
) -> None:
    teacher, _ = (kind.store for kind in road.run().kinds)
    kept, redone = StoreReader(teacher).keys[:2]
    drop_clips(teacher, [kept], detail="a bystander's face")
    drop_clips(teacher, [redone], detail="a new caption", reason="redo")
    road.run(retry_failed=True)
    reader = StoreReader(teacher)
    assert kept not in reader
    assert redone in reader
    assert (kept, "dropped") in [(clip.key, clip.reason) for clip in reader.skipped]


def test_every_retry_is_a_shard_of_its_own_and_the_newest_counts(
    road: Road, stub_tracking: Any
) -> None:
    stub_tracking.lost = {LOST}
    road.run()
    for attempt in (1, 2):
        summary = road.run(retry_failed=True)
        for kind in summary.kinds:
            assert [(c.key, c.reason, c.shard) for c in kind.skipped] == [
                (LOST, "subject_lost", f"00000-retry{attempt}"),
                (BAD, "undecodable", f"00001-retry{attempt}"),
            ]
            assert kind.clips_written == 0


def test_a_store_is_retried_alone_where_only_it_left_a_clip_out(
    road: Road, stub_tracking: Any
) -> None:
    stub_tracking.infinite = {LOST}
    road.run()
    stub_tracking.infinite = set()
    teacher, masks = road.run(retry_failed=True).kinds
    assert (teacher.clips_written, masks.clips_written) == (1, 0)
    assert "masks 00000-retry1" not in road.commits()
    assert LOST in StoreReader(teacher.store)


def test_an_interrupted_retry_goes_on_as_the_same_shard(
    road: Road, stub_tracking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"00000/clip000", LOST}
    stub_tracking.lost = set(keys)
    road.run()
    stub_tracking.lost = set()
    add = ShardWriter.add

    def full(self: Any, key: str, *rest: Any, **named: Any) -> None:
        if key == LOST:
            raise OSError("No space left on device")
        add(self, key, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(OSError, match="No space left"):
            road.run(retry_failed=True)
    summary = road.run(retry_failed=True)
    for kind in summary.kinds:
        reader = StoreReader(kind.store)
        assert {reader.record(key).shard for key in keys} == {"00000-retry1"}
        assert kind.clips_written == 1


@pytest.mark.parametrize("damaged", ["00000", "00000-retry1"])
def test_a_damaged_shard_is_made_again_whether_or_not_it_was_retried(
    damaged: str, road: Road, stub_tracking: Any
) -> None:
    stub_tracking.lost = {LOST}
    road.run()
    stub_tracking.lost = set()
    before = road.run(retry_failed=True).kinds[0]
    reader = StoreReader(before.store)
    where = {key: reader.record(key).shard for key in reader.keys}
    (before.store / "commits" / f"{damaged}.json").unlink()
    repair_store(before.store)
    after = road.run(retry_failed=damaged != "00000").kinds[0]
    reader = StoreReader(after.store)
    assert {key: reader.record(key).shard for key in reader.keys} == where
    assert [c.key for c in after.skipped] == [BAD]
    assert verify_store(after.store).problems == ()


def test_a_skipped_clip_that_has_left_the_dataset_is_not_retried(
    road: Road, stub_tracking: Any, tmp_path: Path
) -> None:
    stub_tracking.lost = {LOST}
    copy = shutil.copytree(road.clips.path, tmp_path / "clips")
    road.clips = road.clips.model_copy(update={"path": copy})
    road.run()
    whole = copy / "00000.tar"
    whole.rename(tmp_path / "old.tar")
    with tarfile.open(tmp_path / "old.tar") as old, tarfile.open(whole, "w") as new:
        for member in old:
            if not member.name.startswith("clip001"):
                new.addfile(member, old.extractfile(member))
    for kind in road.run(retry_failed=True).kinds:
        assert [clip.key for clip in kind.skipped] == [BAD]
        assert "00000-retry1" not in StoreReader(kind.store).shards


def test_workers_begin_with_their_own_share_and_take_the_others_from_the_back() -> None:
    jobs = [
        ShardJob(
            input_name=str(n), name=str(n), source="", keys={}, excluded={}, retried=frozenset()
        )
        for n in range(7)
    ]
    orders = [[int(job.name) for job in rank_order(jobs, rank, 3)] for rank in range(3)]
    assert orders == [
        [0, 3, 6, 4, 1, 5, 2],
        [1, 4, 5, 2, 6, 3, 0],
        [2, 5, 6, 3, 0, 4, 1],
    ]
    assert [job.name for job in rank_order(jobs, 0, 1)] == [job.name for job in jobs]
