import math

import pytest
import torch
from pydantic import ValidationError

from stages.train_student.config import TrainConfig
from stages.train_student.objectives.build import build_objectives


def weighted(**settings):
    (made,) = build_objectives(TrainConfig(steps=11, lgf=settings))
    return made


def test_by_default_it_counts_alike_at_every_step_and_timestep():
    made = weighted()
    assert [made.weight_at(step) for step in (0, 5, 10)] == [0.5] * 3
    abar_B = torch.tensor([1.0, 0.5, 0.0])
    assert made.weights_of(torch.tensor([0, 500, 999]), abar_B).tolist() == [1.0] * 3


def test_it_rises_from_zero_over_the_warm_up():
    made = weighted(weight=0.8, warmup_steps=4)
    found = [made.weight_at(step) for step in range(7)]
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_it_falls_to_its_final_weight_at_the_last_step(warmup_steps):
    steps = 11
    falling = {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
    }
    for schedule, left in falling.items():
        made = weighted(weight=1.0, final_weight=0.2, schedule=schedule, warmup_steps=warmup_steps)
        found = [made.weight_at(step) for step in range(warmup_steps, steps)]
        last = steps - 1 - warmup_steps
        assert found == pytest.approx([0.2 + 0.8 * left(i / last) for i in range(last + 1)])
        assert found[0] == pytest.approx(1.0)
        assert found[-1] == pytest.approx(0.2)
        assert made.weight_at(steps + 5) == pytest.approx(0.2)


def test_timesteps_outside_the_range_do_not_count():
    made = weighted(timesteps=(100, 600))
    found_B = made.weights_of(torch.tensor([99, 100, 600, 601]), torch.full((4,), 0.3))
    assert found_B.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_by_signal_a_clip_counts_by_its_share_of_picture():
    made = weighted(timesteps=(0, 600), timestep_weighting="signal")
    abar_B = torch.tensor([0.9, 0.2, 0.1])
    found_B = made.weights_of(torch.tensor([10, 600, 700]), abar_B)
    torch.testing.assert_close(found_B, torch.tensor([0.9, 0.2, 0.0]))


@pytest.mark.parametrize("timesteps", [(5, 4), (-1, 10), (0, 1000)])
def test_ranges_that_are_none_are_refused(timesteps):
    with pytest.raises(ValidationError, match="timesteps must be 0 <= first <= last <= 999"):
        weighted(timesteps=timesteps)


def test_objectives_keep_their_order_names_and_own_weights():
    config = TrainConfig(objectives=["mask", "lgf", "token-relation"])
    made = build_objectives(config)
    assert [one.name for one in made] == ["mask", "lgf", "token-relation"]
    assert [one.weight_at(0) for one in made] == [0.1, 0.5, 0.5]
