"""Gram flow derived from stored features: values, interruption and resumption."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import (
    CorruptClip,
    SettingsMismatch,
    ShardWriter,
    StoreReader,
    StoreWriter,
    verify_store,
)
from cache_schema.maintenance.drop import change_fingerprints, drop_clips
from cache_schema.maintenance.repair import repair_store
from stages.extract_features.derive import derive_gram_flow
from stages.extract_features.execution import local_engine
from stages.extract_features.summary import KindSummary
from stages.local_gram_flow import regrid_fused
from stages.progress import SilentProgress
from stages.teacher_store.config import FeatureDtype, FlowDtype, GramFlowConfig
from stages.teacher_store.features import decode_features
from stages.teacher_store.gram_flow import decode_gram_flow
from stages.teacher_store.settings import gram_flow_settings
from tests.fingerprints import fingerprint_of
from tests.stages.extract_features.conftest import SHARDS, SKIPPED, files_of, teacher_settings
from tests.stages.local_gram_flow.reference import similarities_by_loop

ALL_KEYS = sorted(key for keys in SHARDS.values() for key in keys)
CPU = torch.device("cpu")


def derive(
    teacher: Path,
    root: Path,
    *,
    radius: int = 2,
    dtype: FlowDtype = "float16",
    grid: tuple[int, int] = (3, 4),
    progress: SilentProgress | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> KindSummary:
    return derive_gram_flow(
        root,
        teacher,
        config=GramFlowConfig(radius=radius, dtype=dtype),
        token_grid=grid,
        device=CPU,
        provenance={"made": "by a test"},
        progress=progress or SilentProgress(),
        rank=rank,
        world_size=world_size,
    )


def read(store: Path, key: str) -> dict[str, torch.Tensor]:
    arrays = StoreReader(store).read(key)
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


@pytest.mark.parametrize("feature_dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float16", 2**-11 + 1e-6), ("uint8", 1 / 255 + 1e-3)]
)
def test_every_clips_flow_is_that_of_its_stored_features(
    write_teacher: Callable[..., Path],
    tmp_path: Path,
    feature_dtype: FeatureDtype,
    dtype: FlowDtype,
    bound: float,
) -> None:
    teacher = write_teacher(feature_dtype)
    summary = derive(teacher, tmp_path / "made", dtype=dtype)
    made = StoreReader(summary.store, kind="gram_flow")
    assert list(made.keys) == ALL_KEYS
    assert made.settings.values["features_dtype"] == feature_dtype
    for key in ALL_KEYS:
        features = decode_features(read(teacher, key)).double().numpy()
        present = np.delete(features, 3, axis=0)
        expected, _ = similarities_by_loop(present[None], 2)
        flow = decode_gram_flow(read(summary.store, key)).numpy()
        assert np.abs(flow[:2] - expected[0, :2]).max() < bound
        assert not flow[2:].any(), "no flow to or from a map of zeros"
        np.testing.assert_array_equal(read(summary.store, key)["valid"], [1, 1, 1, 0, 1])


def test_native_features_are_resampled_first(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher(native=True)
    summary = derive(teacher, tmp_path / "made", grid=(4, 5))
    for key in ("a/0", "c/0"):
        features = decode_features(read(teacher, key)).double()
        regridded = np.delete(regrid_fused(features, 4, 5, 2).numpy(), 3, axis=0)
        expected, _ = similarities_by_loop(regridded[None], 2)
        flow = decode_gram_flow(read(summary.store, key)).numpy()
        assert np.abs(flow[:2] - expected[0, :2]).max() < 2**-11 + 1e-6


def test_shards_sources_attributes_and_skipped_clips_are_those_of_the_features(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = StoreReader(write_teacher())
    summary = derive(Path(teacher.path), tmp_path / "made")
    made = StoreReader(summary.store)
    assert list(made.shards) == list(teacher.shards) == sorted(SHARDS)
    for key in ALL_KEYS:
        found, wanted = made.record(key), teacher.record(key)
        assert (found.shard, found.index, found.source) == (
            wanted.shard,
            wanted.index,
            wanted.source,
        )
        assert found.attributes == {"name": key, "quality": 0.9}
    assert summary.skipped == made.skipped == teacher.skipped
    assert {clip.key for clip in made.skipped} == {"b/3", "d/0"}
    lines = (tmp_path / "made" / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["b/3", "d/0"]
    # Also what a retry brought in stays on the record of the shard that lacked it.
    assert [clip.key for clip in _record_of(summary.store, "00001").skipped] == SKIPPED["00001"]
    assert (summary.clips_written, summary.clips_already_there) == (len(ALL_KEYS), 0)
    assert summary.bytes == made.num_bytes > 0


def _record_of(store: Path, shard: str):
    from cache_schema.names import StoreLayout
    from cache_schema.records import read_commit

    return read_commit(StoreLayout(store), StoreReader(store).settings, shard)


def _die_deriving(teacher: Path, root: Path, *, after: int) -> None:
    """Kills this process when another clip than the first `after` is staged."""
    add, left = ShardWriter.add, iter(range(after))

    def dying(*args: Any, **options: Any) -> None:
        add(*args, **options)
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.add = dying  # type: ignore[method-assign]
    derive(teacher, root)


@pytest.mark.parametrize("clips", range(len(ALL_KEYS)))
def test_killed_and_run_again_it_writes_the_same_files_and_nothing_twice(
    write_teacher: Callable[..., Path], tmp_path: Path, clips: int
) -> None:
    teacher = write_teacher()
    whole = derive(teacher, tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    to = tmp_path / "killed"
    killed = fork.Process(target=_die_deriving, args=(teacher, to), kwargs={"after": clips})
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    again = derive(teacher, to)
    assert files_of(again.store) == files_of(whole.store)
    assert again.clips_written == len(ALL_KEYS) - clips - 1
    third = derive(teacher, to)
    assert (third.clips_written, third.clips_already_there) == (0, len(ALL_KEYS))


def test_two_processes_share_the_shards(write_teacher: Callable[..., Path], tmp_path: Path) -> None:
    teacher = write_teacher()
    whole = derive(teacher, tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    with fork.Pool(2) as pool:
        both = [
            pool.apply_async(derive, (teacher, tmp_path / "shared"), {"rank": n, "world_size": 2})
            for n in range(2)
        ]
        summaries = [one.get(60) for one in both]
    last = derive(teacher, tmp_path / "shared")
    assert sum(one.clips_written for one in (*summaries, last)) == len(ALL_KEYS)
    assert files_of(last.store) == files_of(whole.store)


def test_files_do_not_depend_on_which_shards_come_first(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher()
    whole = derive(teacher, tmp_path / "whole")
    # This rank's share is the retry, whose clip the shard before it has skipped.
    assert sorted(SHARDS)[2] == "00001-retry1"
    last = derive(teacher, tmp_path / "last", rank=2, world_size=3)
    assert files_of(last.store) == files_of(whole.store)


def test_a_shard_that_another_process_is_at_is_waited_for(
    write_teacher: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Releases(SilentProgress):
        def log(self, text: str) -> None:
            if text == "waiting for other processes, which are writing gram_flow 00000":
                held.close()

    monkeypatch.setattr(local_engine, "POLL_INTERVAL_S", 0.0)
    teacher = write_teacher()
    settings = gram_flow_settings(
        StoreReader(teacher).settings, radius=2, dtype="float16", token_grid=(3, 4)
    )
    other = StoreWriter.open(tmp_path / "made", settings, provenance={})
    with contextlib.ExitStack() as held:
        held.enter_context(other.shard("00000", source="00000.tar"))
        summary = derive(teacher, tmp_path / "made", progress=Releases())
    assert summary.clips_written == len(ALL_KEYS)


def test_shards_finished_in_the_moment_since_they_were_asked_for_are_left_alone(
    write_teacher: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_teacher()
    enter, others = ShardWriter.__enter__, []

    def late(shard: ShardWriter) -> ShardWriter:
        monkeypatch.setattr(ShardWriter, "__enter__", enter)
        others.append(derive(teacher, tmp_path / "made"))
        return enter(shard)

    monkeypatch.setattr(ShardWriter, "__enter__", late)
    summary = derive(teacher, tmp_path / "made")
    assert [other.clips_written for other in others] == [len(ALL_KEYS)]
    assert (summary.clips_written, summary.clips_already_there) == (0, len(ALL_KEYS))


def test_a_damaged_clip_of_features_stops_it_by_name(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher()
    file = teacher / "shards" / "00001" / "features" / "c.0.0.0.0.0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptClip, match="b/0"):
        derive(teacher, tmp_path / "made")
    # What came before is finished, and nothing of the damaged shard is.
    made = next((tmp_path / "made").glob("gram_flow-*"))
    assert list(StoreReader(made).shards) == ["00000"]


def test_clips_whose_features_were_made_again_are_derived_again_and_no_others(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher()
    made = derive(teacher, tmp_path / "made").store
    before = StoreReader(made)
    key = before.keys[0]
    changed = fingerprint_of("another video")
    change_fingerprints(teacher, {key: changed})
    summary = derive(teacher, tmp_path / "made")
    assert summary.clips_written == 1
    after = StoreReader(made)
    assert list(after.keys) == list(before.keys)
    assert after.record(key).fingerprint == changed
    assert "retry" in after.record(key).shard
    for other in list(after.keys)[1:]:
        assert after.record(other).fingerprint == fingerprint_of(other)
        assert after.record(other).shard == before.shard_of(other)
    assert verify_store(made).problems == ()
    assert derive(teacher, tmp_path / "made").clips_written == 0


def test_a_store_of_another_grid_or_kind_is_refused_before_any_work(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher()
    with pytest.raises(ValueError, match=r"grid of 3x4 tokens.*make 5x7"):
        derive(teacher, tmp_path / "made", grid=(5, 7))
    assert not (tmp_path / "made").exists()
    made = derive(teacher, tmp_path / "made").store
    with pytest.raises(SettingsMismatch, match="gram_flow"):
        derive(made, tmp_path / "again")


def test_settings_name_what_the_flow_was_computed_from() -> None:
    features = teacher_settings()
    flow = gram_flow_settings(features, radius=2, dtype="float16", token_grid=(3, 4))
    native = teacher_settings(native=True, grid=(6, 6))
    hashes = {
        flow.hash,
        gram_flow_settings(features, radius=1, dtype="float16", token_grid=(3, 4)).hash,
        gram_flow_settings(features, radius=2, dtype="uint8", token_grid=(3, 4)).hash,
        gram_flow_settings(
            teacher_settings("int8"), radius=2, dtype="float16", token_grid=(3, 4)
        ).hash,
        gram_flow_settings(native, radius=2, dtype="float16", token_grid=(3, 4)).hash,
        gram_flow_settings(native, radius=2, dtype="float16", token_grid=(4, 4)).hash,
    }
    assert len(hashes) == 6
    both = dataclasses.replace(
        features, values=features.values | {"fusion": "gram_flow", "forward_weight": 0.5}
    )
    crossed, forward = (
        gram_flow_settings(both, radius=2, dtype="uint8", token_grid=(3, 4), pairs=pairs)
        for pairs in ("crossed", "forward")
    )
    assert (crossed.values["pairs"], forward.values["pairs"]) == ("crossed", "forward")
    assert crossed.hash != forward.hash
    assert crossed.arrays.keys() - forward.arrays.keys() == {
        "gram_flow_back",
        "low_back",
        "step_back",
    }
    assert flow.values.items() >= {"checkpoint_sha256": "ab" * 32, "grid": [3, 4]}.items()
    assert flow.arrays["gram_flow"].shape == (4, 3, 4, 25)
    assert flow.arrays["valid"].shape == (5,)


def test_what_a_repair_took_out_is_derived_again_and_what_was_dropped_is_not(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher("float16")
    made = derive(teacher, tmp_path).store
    before = {key: read(made, key)["gram_flow"] for key in ALL_KEYS}
    shard = StoreReader(made).shard_of(ALL_KEYS[0])
    damaged = StoreReader(made).records(shard)[0]
    (made / "shards" / shard / damaged.arrays["gram_flow"].path).write_bytes(b"")
    repair_store(made)
    dropped, redone = [key for key in ALL_KEYS if key not in {damaged.key}][-2:]
    drop_clips(made, [dropped], detail="a cut")
    drop_clips(made, [redone], detail="to see", reason="redo")
    summary = derive(teacher, tmp_path)
    assert summary.clips_written == 2
    after = StoreReader(made)
    assert list(after.keys) == [key for key in ALL_KEYS if key != dropped]
    assert after.shard_of(damaged.key) == f"{shard}-retry1"
    for key in after.keys:
        assert torch.equal(read(made, key)["gram_flow"], before[key])
    assert derive(teacher, tmp_path).clips_written == 0


def test_a_retry_of_the_features_is_followed_where_that_name_is_taken(
    write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_teacher("float16")
    made = derive(teacher, tmp_path).store
    shard = StoreReader(made).shard_of(ALL_KEYS[0])
    drop_clips(made, ALL_KEYS[:1], detail="", reason="redo")
    derive(teacher, tmp_path)  # makes <shard>-retry1 here
    source = StoreReader(teacher)
    late, arrays = "late/0000", source.read(ALL_KEYS[0])
    writer = StoreWriter.open(teacher.parent, source.settings, provenance={})
    of_shard = source.shards[shard].source
    with writer.shard(f"{shard}-retry1", source=f"{of_shard}, retry 1") as out:
        out.add(late, arrays, fingerprint=fingerprint_of(late))
        out.commit()
    assert derive(teacher, tmp_path).clips_written == 1
    assert StoreReader(made).shard_of(late) == f"{shard}-retry2"
    assert torch.equal(read(made, late)["gram_flow"], read(made, ALL_KEYS[0])["gram_flow"])
