"""Steps whose loss or gradient is no number: the weights stay as they were, and the run goes on.

The training loop goes through here with every backward pass and every update. A bad loss is turned
into a bad gradient, which the sum over the ranks carries to all of them; ZeRO 1 to 3 leave out an
update whose gradient's norm is no number, on every rank alike, and drop what was accumulated.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.train_student.distributed import World, on_first_rank
from stages.train_student.engine import gradient_norm_before_step
from stages.train_student.logs.row_file import read_rows
from stages.train_student.logs.rows import SKIPPED_FILE, SkippedRow
from stages.train_student.step import Losses


class TrainingDivergedError(RuntimeError):
    """Too many losses or gradients in a row are infinite or no number."""


def spoiled_if_not_finite(losses: Losses) -> Tensor:
    """The loss to go backward from: itself, or one of whose gradient nothing is finite.

    Nothing is waited for, and a finite loss is the same to the last bit.
    """
    parts = [losses.total.detach()[None], losses.diffusion_B, *losses.auxiliary_B.values()]
    finite = torch.cat([part.isfinite() for part in parts]).all()
    return losses.total * torch.where(finite, 1.0, math.nan)


def update(engine: Any) -> float | None:
    """Move the weights by the accumulated gradient, and the schedule by a step.

    Returns:
        The gradient's norm before clipping; None where it is no number, and the weights and the
        optimiser's moments are as they were.
    """
    if engine.zero_optimization_stage() == 0:
        norm = gradient_norm_before_step(engine)
        assert norm is not None, "without ZeRO the gradients lie whole on every rank"
        if math.isfinite(norm):
            engine.step()
            return norm
        engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)
        engine.step()  # only counts the forward pass
        engine.set_gradient_accumulation_boundary(None)  # where it is follows from the count again
        _move_schedule_on(engine)
        return None
    engine.step()
    if engine.was_step_applied():
        return float(engine.get_global_grad_norm())
    _move_schedule_on(engine)  # DeepSpeed holds it back: it takes this for fp16's loss scaling
    return None


def _move_schedule_on(engine: Any) -> None:
    with warnings.catch_warnings():
        # torch warns where the very first step is skipped: the schedule goes before the optimiser.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        engine.lr_scheduler.step()


class SkippedInARow:
    """Counts the steps skipped in a row, on every rank alike, and stops the run at too many."""

    def __init__(self, run_dir: Path, steps_done: int, *, most: int, world: World) -> None:
        """Go on from the skipped steps that a run of `steps_done` steps ended with."""
        self._most = most
        self._count = on_first_rank(world, lambda: _at_the_end(run_dir, steps_done))

    def add(self, skipped: SkippedRow | None) -> None:
        """Count a step.

        Raises:
            TrainingDivergedError: naming the step and the clips.
        """
        self._count = 0 if skipped is None else self._count + 1
        if skipped is None or self._count <= self._most:
            return
        in_a_row = f" for the {_ordinal(self._count)} time in a row" if self._count > 1 else ""
        raise TrainingDivergedError(
            f"the {skipped.what} is no number{in_a_row} at step {skipped.step}, clips "
            f"{', '.join(map(repr, skipped.suspects()))}; training stopped, and the last "
            f"checkpoint is from before. {SKIPPED_FILE} in the run's folder has every clip's loss "
            "and timestep: look at the clips with sam2vx-pipeline inspect, and leave them out with "
            "train.leave_out; if they are sound, a lower train.optimizer.learning_rate or "
            "train.deepspeed.precision fp32 may help"
        )


def _at_the_end(run_dir: Path, steps_done: int) -> int:
    skipped = {row["step"] for row in read_rows(run_dir / SKIPPED_FILE)}
    count = 0
    while steps_done - count in skipped:
        count += 1
    return count


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    ending = "th" if number % 100 in (11, 12, 13) else endings.get(number % 10, "th")
    return f"{number}{ending}"
