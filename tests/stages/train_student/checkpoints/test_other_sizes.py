"""Runs that go on with another number of processes: the same state, order, batch and losses."""

import json

import pytest
import torch

from stages.train_student.checkpoints.records import UNIVERSAL, complete_checkpoints
from stages.train_student.checkpoints.universal import universal_copy

QUICK = {(2, 1, 2, "bf16", "lora"), (1, 2, 3, "fp32", "full")}
NEAR = {"fp32": 1e-4, "bf16": 5e-3}


def check(answer):
    assert not any(answer.codes), answer.errors
    return answer.told[0]


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "losses.jsonl").open()]


def _cases():
    for before, after in ((2, 1), (1, 2)):
        for stage in (0, 1, 2, 3):
            for precision in ("fp32", "bf16"):
                for method in ("lora", "full"):
                    case = (before, after, stage, precision, method)
                    name = f"{before} to {after}, ZeRO {stage}, {precision}, {method}"
                    marks = [] if case in QUICK else pytest.mark.slow
                    if (stage, precision) != (0, "bf16"):
                        yield pytest.param(*case, id=name, marks=marks)


@pytest.mark.parametrize(("before", "after", "stage", "precision", "method"), list(_cases()))
def test_another_number_of_processes_goes_on_from_the_same_state(
    train_ranks, tmp_path, before, after, stage, precision, method
):
    """Every weight, moment and rate loaded equals what was saved; then the losses go on."""
    settings = {
        "deepspeed": {"zero_stage": stage, "precision": precision},
        "method": method,
        "checkpoint_every": 9,
        "optimizer": {"schedule": "cosine"},
        "ema": {"decay": 0.9},
        "steps": 4,
    }
    run = tmp_path / "run"
    check(train_ranks(tmp_path / "whole", processes=before, **settings))
    killed = {"rank": 0, "step": 3}
    settings["checkpoint_every"] = 2
    assert -9 in train_ranks(run, processes=before, fault=killed, look=True, **settings).codes
    told = check(train_ranks(run, processes=after, look=True, **settings))
    assert told["resumed_from"] == 2
    assert any("to a universal checkpoint" in line for line in told["lines"]) == (stage > 0)
    saved, loaded = (torch.load(tmp_path / f"run-{what}-2.pt") for what in ("saved", "loaded"))
    assert saved.keys() == loaded.keys()
    assert any(name.endswith("exp_avg") for name in saved)
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    for found, expected in zip(rows_of(run), rows_of(tmp_path / "whole"), strict=True):
        assert found["lr"] == expected["lr"]
        for part in ("loss", "diffusion"):
            assert found[part] == pytest.approx(expected[part], rel=NEAR[precision])
    copies = complete_checkpoints(run / "checkpoints" / UNIVERSAL)
    assert [copy.step for copy in copies] == ([2] if stage else [])


@pytest.fixture(scope="module")
def of_two(train_ranks, tmp_path_factory):
    """A run of two ranks with checkpoints after steps 1 and 2."""
    run = tmp_path_factory.mktemp("two") / "run"
    check(train_ranks(run, processes=2, steps=2, checkpoint_every=1))
    return run


def test_the_universal_copy_is_made_once_and_never_used_half_made(of_two, train, tmp_path):
    newest = complete_checkpoints(of_two / "checkpoints")[0]
    copy = universal_copy(newest)
    made = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert universal_copy(newest) == copy
    assert made == {path: path.stat().st_mtime_ns for path in made}
    victim = max(made, key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    universal_copy(newest)
    assert victim.read_bytes() == whole
    copy.with_name(f"{copy.name}.complete.json").unlink()
    victim.unlink()
    assert universal_copy(newest) == copy
    assert victim.read_bytes() == whole
    left = {path.name for path in copy.parent.iterdir()}
    assert left == {copy.name, f"{copy.name}.complete.json"}


def test_the_copy_goes_with_its_checkpoint(of_two, train):
    universal = of_two / "checkpoints" / UNIVERSAL
    assert train(of_two, steps=4, checkpoint_every=1, checkpoints_kept=1).resumed_from == 2
    assert complete_checkpoints(universal) == []
    assert not list(universal.iterdir())
    assert [found.step for found in complete_checkpoints(universal.parent)] == [4]


@pytest.mark.parametrize(
    ("before", "after", "stage"),
    [(2, 1, 2), *(pytest.param(1, 2, stage, marks=pytest.mark.slow) for stage in (1, 2, 3))],
)
def test_moments_in_eight_bits_are_shared_out_anew(train_ranks, tmp_path, before, after, stage):
    """The blocks are others, so moments are equal but for what one more rounding takes."""
    pytest.importorskip("bitsandbytes")
    settings = {
        "deepspeed": {"zero_stage": stage, "precision": "fp32"},
        "method": "full",
        "optimizer": {"name": "adamw8bit"},
        "checkpoint_every": 2,
    }
    check(train_ranks(tmp_path / "whole", processes=before, steps=4, **settings))
    check(train_ranks(tmp_path / "run", processes=before, steps=2, **settings))
    assert check(train_ranks(tmp_path / "run", processes=after, steps=4, **settings))
    rows, expected = rows_of(tmp_path / "run"), rows_of(tmp_path / "whole")
    assert [row["loss"] for row in rows[:3]] == pytest.approx(
        [row["loss"] for row in expected[:3]], rel=1e-4
    )
    assert rows[3]["loss"] == pytest.approx(expected[3]["loss"], rel=1e-2)


@pytest.mark.slow
def test_shares_of_padding_alone_are_no_hindrance_to_zero_3(train_ranks, tmp_path):
    """Sixteen values are shared by five ranks as 4, 4, 4, 4 and none."""
    settings = {"deepspeed": {"zero_stage": 3}, "method": "full", "batch_size": 5}
    settings |= {
        "checkpoint_every": 9,
        "ema": {"decay": 0.9},
        "optimizer": {"schedule": "constant"},
    }
    check(train_ranks(tmp_path / "whole", steps=4, **settings))
    for processes, steps in ((5, 1), (1, 2), (5, 4)):
        told = check(train_ranks(tmp_path / "run", processes=processes, steps=steps, **settings))
    assert told["resumed_from"] == 2
    for found, expected in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "whole"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.slow
def test_more_ranks_than_the_weights_are_enough_for_are_refused(tiny, train_ranks, tmp_path):
    """Thirty-two weights: of five ranks, which take eight each, the last has none."""
    small = tiny.tiny_transformer(num_attention_heads=1, num_layers=1)
    settings = {
        "base": tiny.save_pipeline(tmp_path / "base", transformer=small),
        "batch_size": 5,
        "objectives": (),
        "lora": {"rank": 1, "target_modules": ("to_q",)},
        "checkpoint_every": 9,
    }
    run = tmp_path / "run"
    check(train_ranks(run, steps=1, **settings))
    answer = train_ranks(run, processes=5, steps=2, **settings)
    assert all(answer.codes)
    assert "too few for 5 processes" in answer.errors
    check(train_ranks(tmp_path / "five", processes=5, steps=1, **settings))
    assert check(train_ranks(tmp_path / "five", steps=2, **settings))["resumed_from"] == 1
