"""Steps whose loss or gradient is no number, in whole trainings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from stages.train_student import train as training
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.guards import TrainingDivergedError
from stages.train_student.step import TrainingStep
from tests.stages.train_student import faulty_steps as faulty

ENGINES = {
    "zero 0": {"deepspeed": {"zero_stage": 0}},
    "zero 1 bf16": {"deepspeed": {"zero_stage": 1, "precision": "bf16"}},
    "zero 2": {"deepspeed": {"zero_stage": 2}},
    "zero 3 full": {"deepspeed": {"zero_stage": 3}, "method": "full"},
    "zero 1": {"deepspeed": {"zero_stage": 1}},
    "zero 2 bf16": {"deepspeed": {"zero_stage": 2, "precision": "bf16"}},
    "zero 2 offload": {"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}},
    "zero 3 offload bf16": {
        "deepspeed": {"zero_stage": 3, "precision": "bf16", "offload_optimizer": "cpu"}
    },
}
QUICK = {
    ("loss", "zero 0"),
    ("loss", "zero 1 bf16"),
    ("loss", "zero 2"),
    ("gradient", "zero 2"),
    ("gradient", "zero 3 full"),
}
LAST = {"steps": 3, "checkpoint_every": 9, "ema": {"decay": 0.5}}


def weights(run_dir):
    files = sorted((run_dir / "export").rglob("*.safetensors"))
    return {f"{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


def losses(run_dir):
    return (run_dir / "losses.jsonl").read_text()


def skipped(run_dir):
    return [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").open()]


@pytest.mark.parametrize(
    ("what", "engine"),
    [
        pytest.param(what, engine, marks=[] if (what, engine) in QUICK else [pytest.mark.slow])
        for what in ("loss", "gradient")
        for engine in ENGINES
    ],
)
def test_a_step_that_is_no_number_leaves_everything_as_if_it_had_not_been(
    train, monkeypatch, tmp_path, engine, what
):
    """Weights, their average and the losses that follow, to the last bit, with accumulation."""
    settings = LAST | ENGINES[engine]
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train_step", faulty.step_left_out(training._train_step, 1))
        train(tmp_path / "left out", **settings)
    with monkeypatch.context() as patch:
        if what == "loss":  # of the first of two forward passes
            read = faulty.spoiled_samples(CachedSamples.__getitem__, {2})
            patch.setattr(CachedSamples, "__getitem__", read)
        else:
            call = faulty.spoiled_gradients(TrainingStep.__call__, 1)
            patch.setattr(TrainingStep, "__call__", call)
        train(tmp_path / "skipped", **settings)
    assert losses(tmp_path / "skipped") == losses(tmp_path / "left out")
    assert [json.loads(line)["step"] for line in losses(tmp_path / "skipped").splitlines()] == [
        1,
        3,
    ]
    left, right = weights(tmp_path / "skipped"), weights(tmp_path / "left out")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    (row,) = skipped(tmp_path / "skipped")
    assert (row["step"], row["what"], len(row["clips"])) == (2, what, 2)


def test_a_skipped_step_is_written_down_and_told(train, lines, monkeypatch, tmp_path):
    read = faulty.spoiled_samples(CachedSamples.__getitem__, {3})
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    summary = train(tmp_path, steps=3, progress=lines)
    assert (summary.steps_done, summary.skipped_steps) == (3, 1)
    (row,) = skipped(tmp_path)
    good, bad = row["clips"]
    assert bad["diffusion"] in ("nan", "inf")
    assert 0 < good["diffusion"] < 10
    assert 0 <= bad["timestep"] <= 999
    assert good["auxiliary"].keys() == {"lgf"}
    told = [line for line in lines.lines if "skipped" in line]
    assert told == [f"step 2 skipped: its loss is NaN or infinite; clips {bad['key']!r}"]
    timed = [json.loads(line) for line in (tmp_path / "performance.jsonl").open()]
    assert [row["step"] for row in timed] == [1, 2, 3]


def test_a_run_with_a_skipped_step_resumes_to_the_last_bit(train, monkeypatch, tmp_path):
    read = faulty.spoiled_samples(CachedSamples.__getitem__, {2})
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    train(tmp_path / "whole", **LAST)
    train(tmp_path / "parts", **LAST | {"steps": 2})
    assert train(tmp_path / "parts", **LAST).resumed_from == 2
    for name in ("losses.jsonl", "skipped_steps.jsonl"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    left, right = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_too_many_in_a_row_stop_the_run_also_over_a_resume(train, monkeypatch, tmp_path):
    samples = {0, 4, 5, 6}  # steps 1, 3 and 4
    read = faulty.spoiled_samples(CachedSamples.__getitem__, samples)
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    train(tmp_path, steps=3, max_skipped_steps=1)
    with pytest.raises(TrainingDivergedError, match=r"2nd consecutive step at step 4, .*inspect"):
        train(tmp_path, steps=9, max_skipped_steps=1)
    assert [row["step"] for row in skipped(tmp_path)] == [1, 3, 4]
    assert not (tmp_path / "finished.json").exists() or (
        json.loads((tmp_path / "finished.json").read_text())["steps"] == 3
    )


def test_none_may_be_skipped_where_that_is_asked_for(train, monkeypatch, tmp_path):
    """A loss that is no number stops the run and names the step and the clip."""
    read = faulty.spoiled_samples(CachedSamples.__getitem__, {2})
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    with pytest.raises(TrainingDivergedError, match="NaN or infinite at step 2, clips 'clip"):
        train(tmp_path, max_skipped_steps=0)
    assert not (tmp_path / "finished.json").exists()


def test_a_run_of_skipped_steps_alone_ends_without_losses(train, monkeypatch, tmp_path):
    read = faulty.spoiled_samples(CachedSamples.__getitem__, {0, 2})
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    summary = train(tmp_path, steps=2)
    assert (summary.first, summary.last, summary.skipped_steps) == (None, None, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_is_no_number_on_one_of_two_ranks_is_skipped_on_both(
    train_ranks, tmp_path, zero_stage
):
    settings = {"steps": 3, "batch_size": 4, "deepspeed": {"zero_stage": zero_stage}}
    for name, fault in (("skipped", "spoil sample 5"), ("left out", "leave out step 1")):
        answer = train_ranks(tmp_path / name, processes=2, spoil=fault, **settings)
        assert not any(answer.codes), answer.errors
    assert losses(tmp_path / "skipped") == losses(tmp_path / "left out")
    left, right = weights(tmp_path / "skipped"), weights(tmp_path / "left out")
    assert all(torch.equal(left[name], right[name]) for name in left)
    (row,) = skipped(tmp_path / "skipped")
    assert (row["step"], len(row["clips"])) == (2, 4)
    assert [isinstance(clip["diffusion"], str) for clip in row["clips"]].count(True) == 1
