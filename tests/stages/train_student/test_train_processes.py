"""Trainings in processes of their own: killed, without sam2, and two at once."""

import json
import signal

import numpy as np
import pytest


@pytest.fixture(scope="module")
def killed(train_process, tmp_path_factory):
    """A run of six steps, killed after step 3; its last checkpoint is from step 2."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    process = train_process(run_dir, steps=6, fault="no sam2, kill at 3")
    _, errors = process.communicate(timeout=200)
    return run_dir, process.returncode, errors


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir, steps=6)
    return run_dir


def test_training_never_imports_sam2_nor_stage_one(killed):
    run_dir, code, errors = killed
    assert code == -signal.SIGKILL, errors
    assert len((run_dir / "losses.jsonl").read_text().splitlines()) == 3


def test_after_a_kill_the_losses_go_on_to_the_last_bit(killed, whole, train):
    summary = train(killed[0], steps=6)
    assert summary.resumed_from == 2
    assert (killed[0] / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()


def test_two_ranks_make_the_steps_of_one(train_process, train, whole, tmp_path):
    # Of the two clips of a step each rank has one, so that its micro-batch cannot be two.
    process = train_process(tmp_path / "run", processes=2, steps=3, micro_batch_size=2)
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1]) == {"steps": 3, "resumed_from": None}
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").open()]
    expected = [json.loads(line) for line in (whole / "losses.jsonl").open()][:3]
    for row, one in zip(rows, expected, strict=True):
        numbers = [
            [r["loss"], r["diffusion"], r["auxiliary"]["lgf"], r["grad_norm"]] for r in (row, one)
        ]
        np.testing.assert_allclose(*numbers, rtol=1e-4)
        assert row["by_timestep"]["count"] == one["by_timestep"]["count"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert train(tmp_path / "run", steps=4).resumed_from == 3
