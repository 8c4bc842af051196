"""The training loop: optimiser steps, their losses, and stopping when one is no number."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from stages.progress import Task
from stages.train_student.data.dataset import Batch
from stages.train_student.distributed import World, gather
from stages.train_student.engine import gradient_norm_before_step
from stages.train_student.loss_record import LossRecord, LossRow
from stages.train_student.step import Losses, TrainingStep


class TrainingDivergedError(RuntimeError):
    """A loss or a gradient is infinite or no number."""


def train_steps(
    engine: Any,
    training_step: TrainingStep,
    batches: Iterator[Batch],
    steps: range,
    *,
    accumulation: int,
    world: World,
    record: LossRecord | None,
    task: Task,
    after_step: Callable[[int], None],
) -> list[float]:
    """Make the optimiser steps `steps` (from 0) and return the seconds each took.

    Args:
        record: where the losses go, on rank 0; None elsewhere.
        after_step: called with the number of steps done, after each.

    Raises:
        TrainingDivergedError: naming the step and the clips; nothing of that step is recorded.
    """
    durations = []
    for step in steps:
        start = time.perf_counter()
        row = _one_step(engine, training_step, batches, step, accumulation, world)
        seconds = time.perf_counter() - start
        durations.append(seconds)
        if record is not None:
            record.add(row, seconds)
        task.advance()
        task.note(f"loss {row.loss:.4f}")
        after_step(row.step)
    return durations


def _one_step(
    engine: Any,
    training_step: TrainingStep,
    batches: Iterator[Batch],
    step: int,
    accumulation: int,
    world: World,
) -> LossRow:
    rate = float(engine.get_lr()[0])
    parts: list[Tensor] = []
    keys: list[tuple[str, ...]] = []
    for number in range(accumulation):
        batch = next(batches).to(world.device)
        losses = training_step(engine, batch)
        engine.backward(losses.total)
        parts.append(_detached(losses))
        keys.append(batch.keys)
        if number < accumulation - 1:
            engine.step()  # counts the forward pass; the weights move at the last one
    loss, diffusion, auxiliary = _mean_over_batch(parts, world)
    if not math.isfinite(loss):
        bad = [group for part, group in zip(parts, keys, strict=True) if not part.isfinite().all()]
        _stop(f"the loss is {loss}", step, bad, world)
    norm = gradient_norm_before_step(engine)
    engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    if not math.isfinite(norm):
        _stop(f"the gradient's norm is {norm}", step, keys, world)
    return LossRow(
        step=step + 1,
        loss=loss,
        diffusion=diffusion,
        auxiliary=None if losses.auxiliary is None else auxiliary,
        grad_norm=norm,
        lr=rate,
    )


def _detached(losses: Losses) -> Tensor:
    auxiliary = losses.auxiliary if losses.auxiliary is not None else losses.total.new_zeros(())
    return torch.stack([losses.total.detach(), losses.diffusion, auxiliary]).double()


def _mean_over_batch(parts: list[Tensor], world: World) -> list[float]:
    mean_3 = torch.stack(parts).mean(0)
    if world.size > 1:
        dist.all_reduce(mean_3)
        mean_3 /= world.size
    return mean_3.tolist()


def _stop(what: str, step: int, batches: list[tuple[str, ...]], world: World) -> NoReturn:
    """Every rank comes here at the same step, since loss and norm are the same on all of them."""
    named = sorted({key for rank in gather(world, batches) for batch in rank for key in batch})
    raise TrainingDivergedError(
        f"{what} at step {step + 1}, clips {', '.join(map(repr, named))}; training stopped, and "
        "the last checkpoint is from before. Look at those clips with sam2vx-pipeline inspect; a "
        "lower train.optimizer.learning_rate or train.deepspeed.precision fp32 may help"
    )
