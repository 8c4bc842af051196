"""Losses on clips that are never trained on."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from cache_schema import CorruptClip
from stages.train_student.data.dataset import Batch
from stages.train_student.model.student import eval_mode
from stages.train_student.parallel.process_group import World
from stages.train_student.step import Losses
from stages.train_student.validation import held_out
from stages.train_student.validation.held_out import HeldOutLosses

KEYS = ("a", "b", "c")
TIMESTEPS = (100, 500, 900)


class Samples:
    """Clips that are no more than their numbers; those in `damaged` cannot be read."""

    def __init__(self, keys=KEYS, damaged=()):
        self.held_out, self._damaged = keys, damaged

    def held_out_batch(self, key, timestep):
        if key in self._damaged:
            raise CorruptClip(f"{key} is damaged")
        number = torch.full((1, 1, 1, 1, 1), float(ord(key)))
        return Batch(
            keys=(key,),
            clean_BFCHW=number,
            noise_BFCHW=number,
            timestep_B=torch.tensor([timestep]),
            text_BLD=number[0],
            image_BFCHW=None,
            teacher=None,
            teacher_valid_BT=None,
            masks=None,
            num_frames=9,
        )


def made_up(key, timestep):
    return ord(key) / 7 + timestep / 3, timestep * ord(key) / 11


def step(student, batch, number):
    """Losses that tell which clip was seen, and draw random numbers as no step should."""
    torch.rand(3)
    assert not student.training
    assert not torch.is_grad_enabled()
    first, second = made_up(batch.keys[0], int(batch.timestep_B))
    one = torch.tensor([first], dtype=torch.float64)
    return Losses(one.sum(), one, {"lgf": torch.tensor([second], dtype=torch.float64)})


def measure(monkeypatch, samples, size=1):
    """Every rank in turn, in this process: what they would add up is added up here."""
    sums, looked, damaged = {}, [], []
    names = iter(["sums", "counts"] * size)

    def all_reduce(tensor):
        name = next(names)
        sums[name] = sums.get(name, 0) + tensor
        tensor.copy_(sums[name])

    def gather(world, value):
        damaged.append(value)
        return damaged

    monkeypatch.setattr(held_out.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(held_out, "gather", gather)
    passes = set()
    for rank in range(size):
        world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
        losses = HeldOutLosses(samples, step, timesteps=TIMESTEPS, objectives=("lgf",), world=world)
        looked.clear()
        row, found = losses(nn.Linear(1, 1), 7, looked.append)
        passes.add(len(looked))
    assert len(passes) == 1, "every rank makes as many forward passes"
    return row, found


@pytest.mark.parametrize("size", [1, 2, 4, 9, 13])
def test_every_clip_counts_once_at_every_timestep_on_any_number_of_ranks(monkeypatch, size):
    row, damaged = measure(monkeypatch, Samples(), size)
    expected_SK2 = np.array([[made_up(key, t) for key in KEYS] for t in TIMESTEPS])
    assert damaged == ()
    assert (row.step, row.clips) == (7, 3)
    assert row.by_timestep["timestep"] == list(TIMESTEPS)
    np.testing.assert_allclose(row.by_timestep["diffusion"], expected_SK2[..., 0].mean(1))
    np.testing.assert_allclose(row.by_timestep["lgf"], expected_SK2[..., 1].mean(1))
    assert row.diffusion == pytest.approx(expected_SK2[..., 0].mean())
    assert row.auxiliary["lgf"] == pytest.approx(expected_SK2[..., 1].mean())


@pytest.mark.parametrize("size", [1, 3])
def test_a_clip_that_cannot_be_read_is_told_and_does_not_count(monkeypatch, size):
    row, damaged = measure(monkeypatch, Samples(damaged=("b",)), size)
    assert [clip.key for clip in damaged] == ["b"]
    assert row.clips == 2
    expected = np.mean([made_up(key, t)[0] for key in "ac" for t in TIMESTEPS])
    assert row.diffusion == pytest.approx(expected)


def test_where_no_clip_can_be_read_the_damage_is_raised(monkeypatch):
    with pytest.raises(CorruptClip, match="damaged"):
        measure(monkeypatch, Samples(damaged=KEYS))


def test_looking_leaves_modes_and_random_numbers_as_they_were():
    student = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    student[1].eval()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with eval_mode(student, torch.device("cpu")):
        assert not student[0].training
        torch.rand(5)
        np.random.rand(5)
    assert (student.training, student[0].training, student[1].training) == (True, True, False)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_model_that_learns_nothing_measures_the_same_again(train, tmp_path):
    """A rate of nearly zero; held-out clips are none of those that are trained on."""
    quiet = {"learning_rate": 1e-30, "weight_decay": 0.0, "warmup_steps": 0}
    summary = train(
        tmp_path, steps=2, optimizer=quiet, validation={"clips": 2, "every": 1}, objectives=[]
    )
    assert summary.clips == 3
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").open()]
    assert [row.pop("step") for row in rows] == [0, 1, 2]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]["by_timestep"]["diffusion"]) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation": {"clips": 2, "timesteps": [1000]}}, r"validation.timesteps must be .*999"),
        ({"validation": {"clips": 2, "timesteps": [5, 5]}}, r"without repeats, got \[5, 5\]"),
        ({"samples": {"prompts": ["a", " "]}}, "holds an empty prompt"),
        ({"samples": {"prompts": ["a"], "images": ["b.png"]}}, "leave out train.samples.images"),
    ],
)
def test_what_cannot_be_measured_or_drawn_is_refused_before_any_work(
    train, tmp_path, changes, words
):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
