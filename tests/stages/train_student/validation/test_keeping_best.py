"""Trainings that keep their best checkpoint."""

import json
from dataclasses import replace

import pytest

from stages.train_student.checkpoints.best import read_best
from stages.train_student.checkpoints.export import export_checkpoint
from stages.train_student.checkpoints.records import checkpoints_of, complete_checkpoints
from stages.train_student.validation.held_out import HeldOutLosses

CURVE = "validation/diffusion"
LOSSES = [9.0, 3.0, 1.0, 2.0, 4.0, 0.5]
"""Held-out loss at each step, the first before training."""
KEEP = {
    "keep_best": CURVE,
    "checkpoint_every": 1,
    "checkpoints_kept": 1,
    "validation": {"clips": 1, "every": 1, "timesteps": [500]},
    "objectives": [],
    "report_to": [],
}


@pytest.fixture
def made_up_losses(monkeypatch):
    compute = HeldOutLosses.__call__

    def call(self, student, step, note):
        row, damaged = compute(self, student, step, note)
        return replace(row, diffusion=LOSSES[step]), damaged

    monkeypatch.setattr(HeldOutLosses, "__call__", call)


def saved(run):
    return sorted(found.step for found in complete_checkpoints(checkpoints_of(run)))


@pytest.mark.usefixtures("made_up_losses")
def test_the_best_checkpoint_stays_across_a_resume_until_another_is_better(train, tmp_path, lines):
    run = tmp_path / "run"
    train(run, steps=3, progress=lines, **KEEP)
    assert saved(run) == [2, 3]
    said = [line for line in lines.lines if "best checkpoint" in line]
    assert said == [
        f"best checkpoint: step 1, {CURVE} 3 (base model: 9)",
        f"best checkpoint: step 2, {CURVE} 1 (step 1: 3, base model: 9)",
        f"best checkpoint still: step 2, {CURVE} 1 (step 3: 2, base model: 9)",
    ]
    train(run, steps=4, **KEEP)
    assert saved(run) == [2, 4]
    best = read_best(run)
    assert (best.step, best.value, best.before_training) == (2, 1.0, 9.0)
    summary = export_checkpoint(run, "best", None)
    assert (summary.step, summary.folder) == (2, run / "export-2")
    train(run, steps=5, **KEEP)
    assert (saved(run), read_best(run).step) == ([5], 5)


@pytest.mark.usefixtures("made_up_losses")
def test_without_the_setting_nothing_is_kept_any_more(train, tmp_path):
    run = tmp_path / "run"
    train(run, steps=3, **KEEP)
    train(run, steps=4, **KEEP | {"keep_best": None})
    assert (saved(run), read_best(run)) == ([4], None)


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_keep_the_best_of_their_samples(
    train_ranks, whole_base, whole_cache, tmp_path
):
    """Three prompts, so that a rank has one more than the other; killed after a first best."""
    settings = {
        "processes": 2,
        "base": whole_base,
        "cache_root": whole_cache,
        "steps": 4,
        "keep_best": "samples/temporal_flickering",
        "checkpoint_every": 1,
        "checkpoints_kept": 1,
        "deepspeed": {"zero_stage": 3},
        "optimizer": {"learning_rate": 0.3, "warmup_steps": 0},
        "samples": {
            "prompts": ["a person walks", "a cat", "a dog"],
            "steps": 2,
            "every": 1,
            "scores": ["vbench"],
        },
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    answer = train_ranks(whole, **settings)
    assert not any(answer.codes), answer.errors
    assert -9 in train_ranks(run, fault={"rank": 1, "step": 4}, **settings).codes
    assert not any(train_ranks(run, **settings).codes)
    values = {}
    for step in range(1, 5):
        record = json.loads((run / "samples" / f"step-{step:06d}" / "samples.json").read_text())
        assert len(record["scores"]) == 3
        values[step] = sum(scores["temporal_flickering"] for scores in record["scores"]) / 3
    best = read_best(run)
    assert best == read_best(whole)
    assert best.step == max(values, key=values.get)
    assert best.value == pytest.approx(values[best.step])
    assert saved(run) == saved(whole) == sorted({best.step, 4})
