"""Runs that are given another number of steps: every step has the rate of the new schedule."""

import json
import math

import pytest


def rates(run_dir):
    return [json.loads(line)["lr"] for line in (run_dir / "losses.jsonl").open()]


def expected(schedule, steps, warmup=2, peak=1e-2):
    """The README's words: linear warm-up to the peak, then stay, or half a cosine to zero."""
    after = [
        1.0 if schedule == "constant" else (1 + math.cos(math.pi * s / (steps - warmup))) / 2
        for s in range(steps - warmup)
    ]
    return [peak * share for share in (*((s + 1) / warmup for s in range(warmup)), *after)]


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_that_is_extended_wastes_no_step(train, lines, tmp_path, schedule, stage):
    settings = {
        "optimizer": {"schedule": schedule},
        "deepspeed": {"zero_stage": stage},
        "progress": lines,
    }
    train(tmp_path, steps=4, **settings)
    assert rates(tmp_path) == pytest.approx(expected(schedule, 4))
    assert not any("train.steps is" in line for line in lines.lines)
    assert train(tmp_path, steps=7, **settings).resumed_from == 4
    assert rates(tmp_path) == pytest.approx(expected(schedule, 4) + expected(schedule, 7)[4:])
    assert min(rates(tmp_path)) > 0
    (told,) = [line for line in lines.lines if "train.steps is" in line]
    if schedule == "constant":
        assert told == ("train.steps is 7, was 4: the learning rate stays as it is, 0.01 at step 5")
    else:
        assert told == (
            "train.steps is 7, was 4: the learning rate falls to zero over 7 steps as if planned "
            "so from the start, 0.00655 at step 5 instead of 0"
        )


def test_a_run_that_is_extended_before_its_end_follows_the_new_schedule_at_once(train, tmp_path):
    settings = {"optimizer": {"schedule": "cosine"}}
    train(tmp_path, steps=2, checkpoint_every=9, **settings)
    train(tmp_path, steps=3, checkpoint_every=9, **settings)
    train(tmp_path, steps=6, checkpoint_every=9, **settings)
    lengths = (2, 2, 3, 6, 6, 6)
    whole = [expected("cosine", length)[step] for step, length in enumerate(lengths)]
    assert rates(tmp_path) == pytest.approx(whole)


def test_the_weights_of_objectives_that_follow_the_length_are_named(train, lines, tmp_path):
    falling = {"lgf": {"schedule": "linear"}, "progress": lines}
    train(tmp_path, steps=1, **falling)
    train(tmp_path, steps=2, **falling)
    assert any(line.endswith("; so does the weight of lgf") for line in lines.lines)


def test_a_resume_with_a_falling_rate_is_exact(train, monkeypatch, tmp_path):
    settings = {"steps": 5, "checkpoint_every": 2, "optimizer": {"schedule": "cosine"}}
    train(tmp_path / "whole", **settings)

    def stop(*arguments, **options):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("stages.train_student.train.export_weights", stop)
        with pytest.raises(InterruptedError):
            train(tmp_path / "parts", **settings)
    folder = tmp_path / "parts" / "checkpoints"
    (folder / "checkpoint-5.complete.json").unlink()  # as if killed while it was written
    assert train(tmp_path / "parts", **settings).resumed_from == 4
    losses = [(tmp_path / run / "losses.jsonl").read_text() for run in ("whole", "parts")]
    assert losses[0] == losses[1]
