"""Trainings whose cache changes while they go on, or between a stop and the resume."""

import json
import threading
import time

import numpy as np
import pytest

from cache_schema import SortedText
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from stages.train_student import train as training
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.order import clip_of_sample
from stages.train_student.data.splits import choose_held_out, compare_clips, digest, write_clips
from stages.train_student.parallel.process_group import World
from stages.train_student.setup import Run


def store_of(cache, kind):
    (store,) = cache.glob(f"{kind}-*")
    return store


@pytest.fixture
def changing(tiny, tmp_path):
    return tiny.write_cache(tmp_path / "cache")


@pytest.fixture
def keys_read(monkeypatch):
    read, keys = CachedSamples.__getitem__, {}

    def read_and_note(self, sample):
        batch = read(self, sample)
        keys[sample] = batch.keys[0]
        return batch

    monkeypatch.setattr(CachedSamples, "__getitem__", read_and_note)
    return keys


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def hurt_a_clip(store):
    min(store.glob("shards/*/mean/c.*")).write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 2])
def test_drop_repair_and_merge_during_a_run_leave_it_going(
    tiny, changing, train, lines, monkeypatch, tmp_path, workers
):
    """Of the neighbours of what goes, in two kinds, none counts as damaged.

    Workers read ahead, and might find the clip damaged before it is repaired: beside them it is
    dropped instead.
    """
    more = tiny.write_cache(tmp_path / "more", keys=("clip/new",))
    step = training._train_step

    def change_then_step(run, engine, training_step, batches, number, *others):
        if number == 1:
            drop_clips(store_of(changing, "teacher"), ["clip/2"], detail="a cut")
            for kind in ("text", "latents", "teacher"):
                merge_stores(store_of(changing, kind), [store_of(more, kind)], prefix="more-")
        if number == 4 and workers:
            drop_clips(store_of(changing, "latents"), ["clip/0"], detail="a cut")
        elif number == 4:
            hurt_a_clip(store_of(changing, "latents"))
            repair_store(store_of(changing, "latents"))
        return step(run, engine, training_step, batches, number, *others)

    monkeypatch.setattr(training, "_train_step", change_then_step)
    settings = {"steps": 24, "max_damaged": 0.0, "loader_workers": workers}
    settings["checkpoint_every"] = 24
    summary = train(tmp_path / "run", cache_root=changing, progress=lines, **settings)
    assert (summary.steps_done, summary.damaged_clips, summary.gone_clips) == (24, 0, 2)
    told = [line for line in lines.lines if line.startswith("warning: clip")]
    assert len(told) == 2, "each of the two is told once"
    assert any("'clip/2' is gone" in line and "dropped (a cut)" in line for line in told)
    why = "dropped (a cut)" if workers else "skipped as damaged"
    assert any("'clip/0' is gone" in line and why in line for line in told)
    gone = rows(tmp_path / "run" / "damaged_clips.jsonl")
    assert {row["key"] for row in gone} == {"clip/0", "clip/2"}
    assert all(row["gone"] for row in gone)
    # The clip that was merged is none of this run's; the message says how to go on without it.
    with pytest.raises(ValueError, match=r"a run on 5 clips, .* 1 to train on .*'clip/new'"):
        train(tmp_path / "run", cache_root=changing, steps=25)
    listed = tmp_path / "run" / "new_clips.jsonl"
    again = train(
        tmp_path / "run",
        cache_root=changing,
        steps=25,
        leave_out=str(listed),
        progress=lines,
        checkpoint_every=25,
    )
    assert (again.resumed_from, again.steps_done, again.clips) == (24, 25, 3)


def test_a_run_goes_on_with_the_clips_that_are_left(changing, train, lines, keys_read, tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, cache_root=changing, steps=3)
    drop_clips(store_of(changing, "text"), ["clip/1", "clip/3"], detail="cuts")
    keys_read.clear()
    summary = train(run_dir, cache_root=changing, steps=6, progress=lines)
    assert (summary.resumed_from, summary.steps_done, summary.clips) == (3, 6, 3)
    (told,) = [line for line in lines.lines if line.startswith("warning")]
    assert "2 of the 5 clips that the run started with" in told
    assert "'clip/1', 'clip/3'. It continues with the 3 others" in told
    left = ["clip/0", "clip/2", "clip/4"]
    assert keys_read == {n: left[clip_of_sample(n, 3, 0)] for n in range(6, 12)}
    assert not (run_dir / "damaged_clips.jsonl").read_text()


def test_no_clip_changes_sides_between_training_and_validation(
    tiny, changing, train, keys_read, tmp_path
):
    run_dir, settings = tmp_path / "run", {"objectives": [], "cache_root": changing}
    validation = {"clips": 2, "every": 100, "timesteps": [500]}
    train(run_dir, steps=2, validation=validation, **settings)
    held = choose_held_out([tiny.KEYS], 2)
    next_in_rank = choose_held_out([tiny.KEYS], 3)[2]
    drop_clips(store_of(changing, "text"), [held[0]], detail="a cut")
    keys_read.clear()
    summary = train(run_dir, steps=8, validation=validation, **settings)
    assert summary.clips == 3
    assert next_in_rank in set(keys_read.values())
    assert held[1] not in set(keys_read.values())
    assert [row["clips"] for row in rows(run_dir / "validation.jsonl")] == [2, 2, 1]
    for other in (0, 3):
        with pytest.raises(ValueError, match=r"validation\.clips=2; another number .*'clip/"):
            train(run_dir, steps=9, validation=validation | {"clips": other}, **settings)


def test_new_clips_are_refused_with_a_manifest_that_leaves_them_out(
    tiny, changing, train, tmp_path
):
    run_dir, bad = tmp_path / "run", tmp_path / "bad.jsonl"
    bad.write_text('{"key": "clip/4"}')
    settings = {"objectives": [], "leave_out": str(bad)}
    train(run_dir, cache_root=changing, steps=2, **settings)
    grown = tiny.write_cache(
        tmp_path / "grown", keys=(*tiny.KEYS[1:], *(f"clip/new {n}" for n in range(5)))
    )
    with pytest.raises(ValueError, match=r"a run on 4 clips, .* are 5 .* and 2 more\.") as error:
        train(run_dir, cache_root=grown, steps=3, **settings)
    manifest = run_dir / "new_clips.jsonl"
    assert f"train.leave_out={manifest}" in str(error.value)
    settings["leave_out"] = str(manifest)
    summary = train(run_dir, cache_root=grown, steps=3, **settings)
    assert (summary.resumed_from, summary.clips) == (2, 3)


def test_a_changed_list_of_the_clips_is_not_believed(tmp_path):
    keys = SortedText.from_strings(["a", "b", "ä x"])
    write_clips(tmp_path, {"9x32x48": keys})
    fewer = {"9x32x48": keys.take(np.array([0, 2]))}
    compare = {"held_out_before": (), "held_out": (), "leave_out": None}
    digests = {"9x32x48": digest(keys)}
    assert compare_clips(tmp_path, digests, {"9x32x48": keys}, **compare) is None
    assert "1 of the 3 clips" in compare_clips(tmp_path, digests, fewer, **compare)
    path = tmp_path / "clips" / "9x32x48.txt"
    path.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"9x32x48\.txt.* is not what the run wrote; restore it"):
        compare_clips(tmp_path, digests, fewer, **compare)
    path.unlink()
    with pytest.raises(ValueError, match=r"9x32x48\.txt.* cannot be read .*restore it"):
        compare_clips(tmp_path, digests, fewer, **compare)


def test_ranks_that_opened_different_caches_are_refused(monkeypatch):
    class Found(Run):
        __slots__ = ()
        num_clips = 4

    stores = type("Stores", (), {"stores": (), "held_out": ("a",)})
    run = Found.__new__(Found)
    object.__setattr__(run, "stores", stores)
    object.__setattr__(run, "world", World(rank=0, local_rank=0, size=2, device=None))
    ranks = "stages.train_student.setup.gather"
    monkeypatch.setattr(ranks, lambda world, mine: [mine, mine])
    run.check_ranks_agree()
    monkeypatch.setattr(ranks, lambda world, mine: [mine, (mine[0], 3)])
    with pytest.raises(ValueError, match=r"different clips .*\(4, 3\).*same command again"):
        run.check_ranks_agree()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_with_loader_processes_see_drops_and_go_on(changing, train_ranks, tmp_path):
    run_dir = tmp_path / "run"
    settings = {
        "processes": 2,
        "cache_root": changing,
        "loader_workers": 2,
        "max_damaged": 0.0,
        "checkpoint_every": 1000,
    }

    def drop_when_it_runs():
        deadline = time.monotonic() + 200
        for steps, kind, key in ((3, "teacher", "clip/2"), (8, "latents", "clip/4")):
            while time.monotonic() < deadline:
                file = run_dir / "losses.jsonl"
                if file.is_file() and file.read_text().count("\n") >= steps:
                    break
                time.sleep(0.02)
            drop_clips(store_of(changing, kind), [key], detail="a cut")

    dropping = threading.Thread(target=drop_when_it_runs)
    dropping.start()
    answer = train_ranks(run_dir, steps=60, **settings)
    dropping.join()
    assert answer.codes == [0, 0], answer.errors
    gone = rows(run_dir / "damaged_clips.jsonl")
    assert {row["key"] for row in gone} == {"clip/2", "clip/4"}
    assert all(row["gone"] for row in gone)
    answer = train_ranks(run_dir, steps=62, **settings)
    assert answer.codes == [0, 0], answer.errors
    assert (answer.told[0]["steps"], answer.told[0]["resumed_from"]) == (62, 60)
    assert any("2 of the 5 clips" in line for line in answer.told[0]["lines"])
