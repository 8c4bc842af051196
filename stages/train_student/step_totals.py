"""The losses of one optimiser step, summed over its forward passes and over all ranks.

The training loop fills one per step. Sums are float64 and made in the same order every time, so
that equal runs write equal rows.

Legend: B clip, S bin of timesteps, V value of a clip (1 for the count, diffusion, each objective).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.train_student.distributed import World, gather
from stages.train_student.logs.rows import TIMESTEP_BINS, LossRow, SkippedClip
from stages.train_student.step import Losses

_TOTAL, _PASSES, _DAMAGED, _FIRST_BIN = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    keys: tuple[str, ...]
    timestep_B: Tensor
    values_BV: Tensor


class StepTotals:
    """Sums the losses of this rank, then of all."""

    def __init__(self, objectives: tuple[str, ...], timesteps: int, device: torch.device) -> None:
        """Begin a step.

        Args:
            objectives: names of the auxiliary losses.
            timesteps: how many the schedule has.
        """
        self._objectives = objectives
        self._timesteps = timesteps
        self._device = device
        self._passes: list[_Pass] = []
        size = _FIRST_BIN + TIMESTEP_BINS * (2 + len(objectives))
        self._sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, keys: tuple[str, ...], timestep_B: Tensor, losses: Losses, damaged: int) -> None:
        """Add a forward pass; nothing is waited for.

        Args:
            keys: of its clips.
            damaged: how many clips it should have shown, but could not.
        """
        auxiliary = [losses.auxiliary_B[name] for name in self._objectives]
        columns = [torch.ones_like(losses.diffusion_B), losses.diffusion_B, *auxiliary]
        values_BV = torch.stack(columns, dim=1).double()
        bin_B = timestep_B * TIMESTEP_BINS // self._timesteps
        bins_S = torch.arange(TIMESTEP_BINS, device=self._device)
        # A product, since index_add_ sums in any order on a GPU.
        sums_SV = (bins_S[:, None] == bin_B).double() @ values_BV
        self._sums[_TOTAL] += losses.total.detach()
        self._sums[_PASSES] += 1
        self._sums[_DAMAGED] += damaged
        self._sums[_FIRST_BIN:] += sums_SV.flatten()
        self._passes.append(_Pass(keys=keys, timestep_B=timestep_B, values_BV=values_BV))

    def over_ranks(self, world: World) -> "StepMeans":
        """Sum over the ranks and wait for the numbers."""
        if world.size > 1:
            dist.all_reduce(self._sums)
        return StepMeans(self._sums.tolist(), self._objectives)

    def clips(self, world: World) -> tuple[SkippedClip, ...]:
        """Every clip of the step with its losses, of all ranks; every rank asks."""
        mine = [clip for one in self._passes for clip in self._clips_of(one)]
        return tuple(clip for rank in gather(world, mine) for clip in rank)

    def _clips_of(self, one: _Pass) -> list[SkippedClip]:
        rows = zip(one.keys, one.timestep_B.tolist(), one.values_BV.tolist(), strict=True)
        return [
            SkippedClip(
                key=key,
                timestep=timestep,
                diffusion=_as_json(diffusion),
                auxiliary=dict(zip(self._objectives, map(_as_json, auxiliary), strict=True)),
            )
            for key, timestep, (_, diffusion, *auxiliary) in rows
        ]


class StepMeans:
    """What a step's losses were over the whole batch."""

    def __init__(self, sums: list[float], objectives: tuple[str, ...]) -> None:
        self._objectives = objectives
        self._values = 2 + len(objectives)
        self._bins = [
            sums[start : start + self._values]
            for start in range(_FIRST_BIN, len(sums), self._values)
        ]
        self.finite = all(map(math.isfinite, sums))
        """Whether every loss of every clip is a number."""
        self.loss = sums[_TOTAL] / sums[_PASSES]
        self.damaged = round(sums[_DAMAGED])
        """How many clips the ranks could not read."""

    def row(self, step: int, grad_norm: float, rate: float) -> LossRow:
        """Only of a step that is `finite`."""
        clips, *sums = (math.fsum(column) for column in zip(*self._bins, strict=True))
        means = [value / clips for value in sums]
        return LossRow(
            step=step,
            loss=self.loss,
            diffusion=means[0],
            auxiliary=dict(zip(self._objectives, means[1:], strict=True)),
            grad_norm=grad_norm,
            lr=rate,
            by_timestep=self._by_timestep(),
        )

    def _by_timestep(self) -> dict[str, list[Any]]:
        counts = [round(values[0]) for values in self._bins]
        told: dict[str, list[Any]] = {"count": counts}
        for column, name in enumerate(("diffusion", *self._objectives), 1):
            told[name] = [
                values[column] / count if count else None
                for values, count in zip(self._bins, counts, strict=True)
            ]
        return told


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
