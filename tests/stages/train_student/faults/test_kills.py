"""Two ranks, one killed again and again at random: the run ends as if nothing had happened."""

import itertools
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from stages.train_student.checkpoints.records import complete_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = 20
SETTINGS = {
    "processes": 2,
    "steps": 16,
    "checkpoint_every": 1,
    "checkpoints_kept": 2,
    "ema": {"decay": 0.9},
    "loader_workers": 1,
}


@pytest.fixture(scope="module")
def undisturbed(request, train_ranks, tmp_path_factory):
    """The run, what it asked for, its seconds, and its file operations by rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    settings = SETTINGS | {"deepspeed": {"zero_stage": request.param}}
    answer = train_ranks(run, **settings)
    assert not any(answer.codes), answer.errors
    return run, settings, answer.seconds, [told["operations"] for told in answer.told]


def faults(seconds, operations, steps):
    """One in three at any moment, the others at a file operation within some steps of a start."""
    choose = random.Random(7)
    for number in itertools.count():
        rank = choose.randrange(2)
        if number % 3 == 0:
            yield {"rank": rank, "after_s": choose.uniform(0.0, 0.5 * seconds)}
        else:
            yield {"rank": rank, "operation": choose.randint(1, 4 * operations[rank] // steps)}


@pytest.mark.parametrize("undisturbed", [2, 3], ids=["ZeRO 2", "ZeRO 3"], indirect=True)
def test_after_twenty_kills_losses_and_weights_are_the_same_to_the_last_bit(
    undisturbed, train_ranks, tmp_path
):
    """A run that ends in spite of its faults is compared, and the next begins anew."""
    whole, settings, seconds, operations = undisturbed
    run, killed, torn = tmp_path / "run", 0, 0
    for fault in faults(seconds, operations, settings["steps"]):
        before = [found.step for found in complete_checkpoints(run / "checkpoints")]
        answer = train_ranks(run, fault=fault, **settings)
        killed += answer.codes[fault["rank"]] == -9
        if killed == KILLS:
            break
        kept = [found.step for found in complete_checkpoints(run / "checkpoints")]
        assert max(kept, default=0) >= max(before, default=0), (fault, answer.errors)
        folders = [path for path in (run / "checkpoints").glob("checkpoint-*") if path.is_dir()]
        torn += len(folders) > len(kept)
        if not any(answer.codes):
            assert_same_run(run, whole)
            shutil.rmtree(run)
    answer = train_ranks(run, **settings)
    assert not any(answer.codes), answer.errors
    assert torn > 0, "some kills hit a checkpoint half written or half removed"
    assert_same_run(run, whole)


@pytest.mark.parametrize("undisturbed", [2], ids=["ZeRO 2"], indirect=True)
def test_operations_spread_over_two_checkpoints_are_survived(undisturbed, train_ranks, tmp_path):
    """Each time from a run that was killed in its sixth step."""
    whole, settings, _, operations = undisturbed
    start, run = tmp_path / "start", tmp_path / "run"
    assert -9 in train_ranks(start, fault={"rank": 0, "step": 6}, **settings).codes
    for rank in (0, 1):
        of_two = 2 * operations[rank] // settings["steps"]
        for operation in range(1, of_two, max(of_two // 6, 1)):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(start, run)
            fault = {"rank": rank, "operation": operation}
            train_ranks(run, fault=fault, **settings)
            assert complete_checkpoints(run / "checkpoints")[0].step >= 5, fault
    answer = train_ranks(run, **settings)
    assert not any(answer.codes), answer.errors
    assert_same_run(run, whole)


def assert_same_run(run, whole):
    assert (run / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    assert json.loads((run / "finished.json").read_text())["steps"] == SETTINGS["steps"]
    exports = sorted((whole / "export").rglob("*.safetensors"))
    assert exports
    for export in exports:
        left, right = load_file(run / export.relative_to(whole)), load_file(export)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    left = [found.step for found in complete_checkpoints(run / "checkpoints")]
    assert left == [SETTINGS["steps"], SETTINGS["steps"] - 1]
    folders = [path for path in (run / "checkpoints").glob("checkpoint-*") if path.is_dir()]
    assert len(folders) == 2, "nothing is left behind"
