"""Runs that end and go on, in one and two processes, at every ZeRO stage: equal to the last bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

EXPORT = "export/pytorch_lora_weights.safetensors"


def losses(run_dir):
    return (run_dir / "losses.jsonl").read_text()


def check(answer):
    assert not any(answer.codes), answer.errors
    return answer.told[0]


def assert_same_weights(left, right):
    left, right = load_file(left), load_file(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


STAGES = [
    {"zero_stage": stage, "precision": precision}
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    if (stage, precision) != (0, "bf16")
]
QUICK = {(1, 0, "fp32"), (2, 2, "bf16"), (1, 3, "bf16")}


def _case(processes, engine):
    quick = (processes, *engine.values()) in QUICK
    name = f"{processes} ranks, ZeRO {engine['zero_stage']}, {engine['precision']}"
    return pytest.param(processes, engine, id=name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("processes", "engine"), [_case(processes, engine) for processes in (1, 2) for engine in STAGES]
)
def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(
    train_ranks, tmp_path, processes, engine
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"deepspeed": engine, "processes": processes, "ema": {"decay": 0.9}}
    check(train_ranks(whole, steps=4, checkpoint_every=9, **settings))
    check(train_ranks(parts, steps=2, checkpoint_every=9, **settings))
    assert check(train_ranks(parts, steps=4, **settings))["resumed_from"] == 2
    assert losses(parts) == losses(whole)
    assert_same_weights(parts / EXPORT, whole / EXPORT)


def test_a_resume_may_change_how_the_work_is_done(train, tmp_path):
    quiet = {"report_to": (), "log_every": 1, "gradient_checkpointing": False}
    train(tmp_path / "whole", steps=4, checkpoint_every=9)
    train(tmp_path / "parts", steps=2, checkpoint_every=9)
    train(
        tmp_path / "parts",
        steps=4,
        checkpoint_every=1,
        max_skipped_steps=0,
        max_damaged=1.0,
        validation={"every": 7},
        samples={"steps": 3},
        deepspeed={"offload_optimizer": "cpu"},
        **quiet,
    )
    rows, expected = (
        [json.loads(line)["loss"] for line in losses(tmp_path / run).splitlines()]
        for run in ("parts", "whole")
    )
    assert rows == pytest.approx(expected, rel=1e-5)


def test_a_resume_may_change_the_micro_batch(train, tmp_path):
    train(tmp_path / "whole", steps=4, checkpoint_every=9)
    train(tmp_path / "parts", steps=2, checkpoint_every=9)
    assert train(tmp_path / "parts", steps=4, micro_batch_size=2).resumed_from == 2
    rows, expected = (
        [json.loads(line)["loss"] for line in losses(tmp_path / run).splitlines()]
        for run in ("parts", "whole")
    )
    assert rows == pytest.approx(expected, rel=1e-4)


def test_what_decides_the_weights_may_not_change(train, tmp_path):
    train(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"train.deepspeed.zero_stage was 2, is 3"):
        train(tmp_path, steps=2, deepspeed={"zero_stage": 3})
    with pytest.raises(ValueError, match=r"train.batch_size was 2, is 4"):
        train(tmp_path, steps=2, batch_size=4)


def test_the_base_model_is_told_by_what_it_holds_not_by_its_path(tiny, base_model, train, tmp_path):
    base = shutil.copytree(base_model, tmp_path / "base")
    run = tmp_path / "run"
    train(run, base=base, steps=1)
    (tmp_path / "link").symlink_to(base)
    assert train(run, base=tmp_path / "link", steps=2).resumed_from == 1
    other = tiny.tiny_transformer()
    other.proj_out.bias.data += 1
    tiny.save_pipeline(base, transformer=other)
    with pytest.raises(ValueError, match=r"model\.weights was '[0-9a-f]{16}', is '"):
        train(run, base=base, steps=3)
    assert train(run, base=base_model, steps=3).resumed_from == 2


def test_what_waited_on_a_disk_is_not_gone_on_from(train, tmp_path):
    """DeepSpeed would load a part of it and train on, with other losses."""
    train(tmp_path, steps=1)
    (tmp_path / "checkpoints" / "checkpoint-1" / "offloaded_tensors").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: .* to cpu"):
        train(tmp_path, steps=2)
