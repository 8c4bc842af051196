"""Losses on the held-out clips, each at fixed timesteps with fixed draws and noise.

The ranks share the clips, and all of them make the same number of forward passes, which ZeRO 3
needs: a rank with nothing left to do repeats a clip that does not count.

Legend: B clip (one), S timestep, M mean (diffusion, then each objective).
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from stages.processes.background import DaemonPool, result_of
from stages.train_student.data.damaged import UNREADABLE, DamagedClip
from stages.train_student.data.dataset import Batch, CachedSamples
from stages.train_student.logging.rows import ValidationRow
from stages.train_student.parallel.process_group import World, gather
from stages.train_student.step import TrainingStep
from stages.train_student.validation.samples import undisturbed

Item: TypeAlias = tuple[str, int]
"""A clip's key, and a timestep."""


class HeldOutLosses:
    """Measures the student, as often as it is called."""

    def __init__(
        self,
        samples: CachedSamples,
        training_step: TrainingStep,
        *,
        timesteps: tuple[int, ...],
        objectives: tuple[str, ...],
        world: World,
    ) -> None:
        """Share the clips among the ranks.

        Args:
            samples: with at least one clip held out.
            timesteps: at which noise each clip is seen.
            objectives: the auxiliary losses.
        """
        self._samples = samples
        self._training_step = training_step
        self._timesteps = timesteps
        self._objectives = objectives
        self._world = world
        self._items = [(key, timestep) for key in samples.held_out for timestep in timesteps]
        self.passes = -(-len(self._items) // world.size)
        """Forward passes of every rank."""

    def __call__(
        self, student: nn.Module, step: int, note: Callable[[str], None]
    ) -> tuple[ValidationRow, tuple[DamagedClip, ...]]:
        """The losses after `step` steps, the same on every rank; every rank must call this.

        Args:
            note: told how far it is.

        Returns:
            The row, and the clips that could not be read: they are missing from it.

        Raises:
            CacheError: no held-out clip can be read, or the cache cannot be reached.
        """
        device = self._world.device
        sums_SM = torch.zeros(
            len(self._timesteps), 1 + len(self._objectives), dtype=torch.float64, device=device
        )
        counts_S = torch.zeros(len(self._timesteps), dtype=torch.float64, device=device)
        damaged: dict[str, DamagedClip] = {}
        with undisturbed(student, device), DaemonPool(1, "held-out") as reader:
            waiting = reader.submit(self._read, 0, damaged)
            for number in range(self.passes):
                waiting, batch, counts = self._next(waiting, number, reader, damaged)
                losses = self._training_step(student, batch.to(device), step)
                if counts:
                    place = self._timesteps.index(int(batch.timestep_B))
                    means = [losses.diffusion_B, *(losses.auxiliary_B[n] for n in self._objectives)]
                    sums_SM[place] += torch.cat(means).double()
                    counts_S[place] += 1
                note(f"validating {number + 1}/{self.passes}")
        if self._world.size > 1:
            dist.all_reduce(sums_SM)
            dist.all_reduce(counts_S)
        found = {
            clip.key: clip for of_rank in gather(self._world, damaged) for clip in of_rank.values()
        }
        clips = len(self._samples.held_out) - len(found)
        return self._row(step, clips, sums_SM.cpu(), counts_S.cpu()), tuple(found.values())

    def _next(
        self,
        waiting: "Future[tuple[Batch, bool]]",
        number: int,
        reader: DaemonPool,
        damaged: dict[str, DamagedClip],
    ) -> tuple["Future[tuple[Batch, bool]]", Batch, bool]:
        """What was being read, while the one after it is read beside the forward pass."""
        batch, counts = result_of(waiting, "reading a held-out clip")
        if number + 1 < self.passes:
            waiting = reader.submit(self._read, number + 1, damaged)
        return waiting, batch, counts

    def _read(self, number: int, damaged: dict[str, DamagedClip]) -> tuple[Batch, bool]:
        """This rank's item of that number, and whether it counts; in place of one that is not
        there, or cannot be read, the next one that can.
        """
        first = self._world.rank * self.passes + number
        for place in range(first, first + len(self._items)):
            key, timestep = self._items[place % len(self._items)]
            try:
                batch = self._samples.held_out_batch(key, timestep)
            except UNREADABLE as error:
                damaged[key] = DamagedClip.because_of(error, key)
                last = error
                continue
            return batch, place == first < len(self._items)
        raise last

    def _row(
        self, step: int, clips: int, sums_SM: torch.Tensor, counts_S: torch.Tensor
    ) -> ValidationRow:
        names = ("diffusion", *self._objectives)
        by_timestep: dict[str, list[Any]] = {"timestep": list(self._timesteps)}
        means_SM = (sums_SM / counts_S[:, None]).tolist()
        for column, name in enumerate(names):
            by_timestep[name] = [_number(means[column]) for means in means_SM]
        whole = {
            name: _number(value)
            for name, value in zip(names, (sums_SM.sum(0) / counts_S.sum()).tolist(), strict=True)
        }
        return ValidationRow(
            step=step,
            clips=clips,
            diffusion=whole.pop("diffusion"),
            auxiliary=whole,
            by_timestep=by_timestep,
        )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
