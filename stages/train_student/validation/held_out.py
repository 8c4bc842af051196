"""Losses on the held-out clips, each at fixed timesteps with fixed random draws and noise.

The clips are split over the ranks. All ranks make the same number of forward passes, as ZeRO 3
requires: a rank with fewer clips repeats one, which is not counted.

Legend: B clip (one), S timestep, M mean (diffusion, then each objective).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stages.processes.background import DaemonPool, result_of
from stages.train_student.data.dataset import UNREADABLE, Batch, CachedSamples, DamagedClip
from stages.train_student.logging.rows import ValidationRow
from stages.train_student.model.student import eval_mode
from stages.train_student.parallel.process_group import World, gather
from stages.train_student.step import TrainingStep


class HeldOutLosses:
    """Callable that computes the losses of the student on the held-out clips."""

    def __init__(
        self,
        samples: CachedSamples,
        training_step: TrainingStep,
        *,
        timesteps: tuple[int, ...],
        objectives: tuple[str, ...],
        world: World,
    ) -> None:
        """Split the clips over the ranks.

        Args:
            samples: training samples, with at least one held-out clip.
            timesteps: timesteps at which each clip is evaluated.
            objectives: names of the auxiliary losses.
        """
        self._samples = samples
        self._training_step = training_step
        self._timesteps = timesteps
        self._objectives = objectives
        self._world = world
        self._items = [(key, timestep) for key in samples.held_out for timestep in timesteps]
        self.passes = -(-len(self._items) // world.size)
        """Number of forward passes of each rank."""

    def __call__(
        self, student: nn.Module, step: int, note: Callable[[str], None]
    ) -> tuple[ValidationRow, tuple[DamagedClip, ...]]:
        """Compute the losses after `step` steps; every rank must call this and gets the same.

        Args:
            note: called with a progress text.

        Returns:
            The row, and the clips that could not be read and are missing from it.

        Raises:
            CacheError: no held-out clip can be read, or the cache cannot be reached.
        """
        device = self._world.device
        sums_SM = torch.zeros(
            len(self._timesteps), 1 + len(self._objectives), dtype=torch.float64, device=device
        )
        counts_S = torch.zeros(len(self._timesteps), dtype=torch.float64, device=device)
        damaged: dict[str, DamagedClip] = {}
        with eval_mode(student, device), DaemonPool(1, "held-out") as reader:
            pending = reader.submit(self._read, 0, damaged)
            for number in range(self.passes):
                batch, counts = result_of(pending, "reading a held-out clip")
                if number + 1 < self.passes:
                    pending = reader.submit(self._read, number + 1, damaged)
                losses = self._training_step(student, batch.to(device), step)
                if counts:
                    row = self._timesteps.index(int(batch.timestep_B))
                    means = [losses.diffusion_B, *(losses.auxiliary_B[n] for n in self._objectives)]
                    sums_SM[row] += torch.cat(means).double()
                    counts_S[row] += 1
                note(f"validating {number + 1}/{self.passes}")
        if self._world.size > 1:
            dist.all_reduce(sums_SM)
            dist.all_reduce(counts_S)
        damaged = {
            clip.key: clip for of_rank in gather(self._world, damaged) for clip in of_rank.values()
        }
        clips = len(self._samples.held_out) - len(damaged)
        return self._row(step, clips, sums_SM.cpu(), counts_S.cpu()), tuple(damaged.values())

    def _read(self, number: int, damaged: dict[str, DamagedClip]) -> tuple[Batch, bool]:
        """Read item `number` of this rank; returns the batch and whether it counts.

        If there is no such item, or it cannot be read, the next readable item is returned, which
        does not count.
        """
        first = self._world.rank * self.passes + number
        for index in range(first, first + len(self._items)):
            key, timestep = self._items[index % len(self._items)]
            try:
                batch = self._samples.held_out_batch(key, timestep)
            except UNREADABLE as error:
                damaged[key] = DamagedClip.from_error(error, key)
                last = error
                continue
            return batch, index == first < len(self._items)
        raise last

    def _row(
        self, step: int, clips: int, sums_SM: torch.Tensor, counts_S: torch.Tensor
    ) -> ValidationRow:
        names = ("diffusion", *self._objectives)
        by_timestep: dict[str, list[Any]] = {"timestep": list(self._timesteps)}
        means_SM = (sums_SM / counts_S[:, None]).tolist()
        for column, name in enumerate(names):
            by_timestep[name] = [_finite_or_none(means[column]) for means in means_SM]
        overall = {
            name: _finite_or_none(value)
            for name, value in zip(names, (sums_SM.sum(0) / counts_S.sum()).tolist(), strict=True)
        }
        return ValidationRow(
            step=step,
            clips=clips,
            diffusion=overall.pop("diffusion"),
            auxiliary=overall,
            by_timestep=by_timestep,
        )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
