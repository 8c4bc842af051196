"""The training loop: optimiser steps one after the other, and what is known of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stages.progress import Task
from stages.stop_request import StopRequest
from stages.train_student.damaged_clips import DamagedClips
from stages.train_student.data.damaged import DamagedClip
from stages.train_student.data.dataset import Batch
from stages.train_student.logs.rows import SkippedRow, StepRows
from stages.train_student.logs.run_log import RunLog
from stages.train_student.performance import DeviceRate, StepClock
from stages.train_student.run import Run
from stages.train_student.skipped_steps import SkippedInARow, spoiled_if_not_finite, update
from stages.train_student.step import TrainingStep
from stages.train_student.step_totals import StepTotals


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """What every step needs."""

    run: Run
    engine: Any
    training_step: TrainingStep
    batches: Iterator[Batch]
    """Of this rank, in order."""
    skipped: SkippedInARow
    damaged: DamagedClips
    rate: DeviceRate | None
    """What a batch costs and the device can do; None if not known."""
    stop: StopRequest
    log: RunLog | None
    """On rank 0."""
    after_update: Callable[[], None]
    """Called when a step moved the weights."""
    after_step: Callable[[int, bool], None]
    """Called after every step with the number of steps done, and whether the run stops after it
    because it was asked to."""

    def make(self, steps: range, task: Task) -> list[float]:
        """Make the optimiser steps `steps` (from 0) and return the seconds each took.

        Raises:
            TrainingDivergedError: too many losses or gradients in a row are no number.
            TooManyDamaged: too many clips cannot be read.
            KeyboardInterrupt: a process was asked to stop; `after_step` has kept what was done.
        """
        durations = []
        for step in steps:
            rows, stop = self._step(step)
            durations.append(rows.performance.seconds)
            if self.log is not None:
                self.log.add(rows)
            self.skipped.add(rows.skipped)
            self.damaged.add(rows.damaged)
            task.advance()
            if rows.losses is not None:
                task.note(f"loss {rows.losses.loss:.4f}")
            self.after_step(step + 1, stop)
            if stop and step + 1 < steps.stop:
                self.run.progress.log(f"stopped after step {step + 1}, which is kept")
                self.stop.fulfil()
                raise KeyboardInterrupt
        return durations

    def _step(self, step: int) -> tuple[StepRows, bool]:
        run, world = self.run, self.run.world
        rate = float(self.engine.get_lr()[0])
        clock = StepClock()
        totals = StepTotals(run.config.objectives, run.timesteps, world.device)
        damaged: list[DamagedClip] = []
        for number in range(run.accumulation):
            batch = clock.next(self.batches).to(world.device)
            losses = self.training_step(self.engine, batch, step)
            self.engine.backward(spoiled_if_not_finite(losses))
            totals.add(batch.keys, batch.timestep_B, losses, len(batch.damaged))
            damaged += batch.damaged
            if self.rate is not None:
                clock.add_flops(self.rate.model_flops(batch))
            if number < run.accumulation - 1:
                self.engine.step()  # counts the forward pass; the weights move at the last one
        norm = update(self.engine)
        if norm is not None:
            self.after_update()
        means = totals.over_ranks(world)
        skipped = None
        if norm is None:
            what = "gradient" if means.finite else "loss"
            skipped = SkippedRow(step=step + 1, what=what, clips=totals.clips(world))
        rows = self.damaged.of_all_ranks(step + 1, damaged) if means.damaged else ()
        performance, stop = clock.row(
            step + 1,
            clips=run.config.batch_size,
            world=world,
            peak_flops=None if self.rate is None else self.rate.peak_flops,
            stop=self.stop.made,
        )
        losses_row = None if norm is None else means.row(step + 1, norm, rate)
        return (
            StepRows(performance=performance, losses=losses_row, skipped=skipped, damaged=rows),
            stop,
        )
