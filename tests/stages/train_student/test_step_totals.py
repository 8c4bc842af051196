"""Sums of a step's losses, against loops in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.train_student.guards import nan_if_nonfinite
from stages.train_student.parallel.process_group import World
from stages.train_student.step import Losses, StepMeans, StepTotals

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
NAMES = ("lgf", "token-relation")

clips = st.lists(
    st.tuples(
        st.integers(0, 999),
        st.floats(0, 100, width=32),
        st.floats(0, 100, width=32),
        st.floats(0, 100, width=32),
    ),
    min_size=1,
    max_size=4,
)


def of_passes(passes, names=NAMES):
    totals = StepTotals(names, 1000, ALONE.device)
    for number, one in enumerate(passes):
        timestep_B, *columns = (list(column) for column in zip(*one, strict=True))
        diffusion_B, *auxiliary = map(torch.tensor, columns)
        losses = Losses(
            total=(diffusion_B + sum(auxiliary)).mean(),
            diffusion_B=diffusion_B,
            auxiliary_B=dict(zip(names, auxiliary, strict=True)),
        )
        keys = tuple(f"{number}/{clip}" for clip in range(len(one)))
        totals.add(keys, torch.tensor(timestep_B), losses, damaged=number)
    return totals


@settings(max_examples=50)
@given(st.lists(clips, min_size=1, max_size=4))
def test_means_and_bins_are_those_of_a_loop(passes):
    row = of_passes(passes).over_ranks(ALONE).row(3, 1.5, 1e-4)
    every = [clip for one in passes for clip in one]
    assert (row.step, row.grad_norm, row.lr) == (3, 1.5, 1e-4)
    assert row.diffusion == pytest.approx(sum(clip[1] for clip in every) / len(every), rel=1e-12)
    for column, name in enumerate(NAMES, 2):
        mean = sum(clip[column] for clip in every) / len(every)
        assert row.auxiliary[name] == pytest.approx(mean, rel=1e-12)
    for number in range(10):
        inside = [clip for clip in every if 100 * number <= clip[0] < 100 * (number + 1)]
        assert row.by_timestep["count"][number] == len(inside)
        for column, name in enumerate(("diffusion", *NAMES), 1):
            mean = sum(clip[column] for clip in inside) / len(inside) if inside else None
            assert row.by_timestep[name][number] == (mean and pytest.approx(mean, rel=1e-12))


def test_the_loss_is_the_mean_of_the_passes_and_damage_adds_up():
    means = of_passes([[(5, 1.0, 2.0, 0.0)], [(10, 3.0, 0.0, 0.0)], [(7, 0.0, 0.0, 9.0)]])
    means = means.over_ranks(ALONE)
    assert means.loss == 5.0
    assert means.damaged == 3
    assert means.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [1, 2, 3])
def test_one_clip_that_is_no_number_is_found_and_named(bad, column):
    clip = [10, 1.0, 1.0, 1.0]
    clip[column] = bad
    totals = of_passes([[(5, 1.0, 2.0, 3.0)], [tuple(clip)]])
    assert not totals.over_ranks(ALONE).finite
    good, found = totals.clips(ALONE)
    assert (good.key, good.timestep, good.diffusion) == ("0/0", 5, 1.0)
    assert good.auxiliary == {"lgf": 2.0, "token-relation": 3.0}
    values = [found.diffusion, *found.auxiliary.values()]
    assert values[column - 1] == str(bad)
    assert [value for value in values if value != str(bad)] == [1.0, 1.0]


def test_plain_fine_tuning_has_no_auxiliary_columns():
    row = of_passes([[(999, 2.0)]], names=()).over_ranks(ALONE).row(1, 1.0, 1.0)
    assert row.auxiliary == {}
    assert row.by_timestep == {"count": [0] * 9 + [1], "diffusion": [None] * 9 + [2.0]}


def test_sums_of_ranks_give_the_row_of_one():
    """What the ranks' all-reduce does, by hand."""
    passes = [[(5, 1.0, 2.0, 3.0)], [(905, 4.0, 0.5, 0.25)]]
    apart = [of_passes([one])._sums for one in passes]
    summed = StepMeans((apart[0] + apart[1]).tolist(), NAMES)
    together = of_passes(passes).over_ranks(ALONE)
    assert summed.row(1, 1.0, 1.0) == together.row(1, 1.0, 1.0)


def test_a_finite_loss_goes_backward_to_the_last_bit_and_any_other_spoils_every_gradient():
    weight = torch.tensor([0.3, 0.7], requires_grad=True)
    losses = Losses(
        total=(weight * weight).sum(),
        diffusion_B=torch.tensor([1.0]),
        auxiliary_B={"lgf": torch.tensor([2.0])},
    )
    (expected,) = torch.autograd.grad(losses.total, weight, retain_graph=True)
    (found,) = torch.autograd.grad(nan_if_nonfinite(losses), weight, retain_graph=True)
    assert torch.equal(found, expected)
    spoiled = [
        replace(losses, diffusion_B=torch.tensor([math.inf])),
        replace(losses, auxiliary_B={"lgf": torch.tensor([math.nan])}),
    ]
    for bad in spoiled:
        (found,) = torch.autograd.grad(nan_if_nonfinite(bad), weight, retain_graph=True)
        assert found.isnan().all()
