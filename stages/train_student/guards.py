"""What keeps a run going, and stops it: steps with NaN or infinite losses, and damaged clips.

A bad loss is turned into a bad gradient, which the reduction carries to all ranks. ZeRO 1 to 3 skip
an update whose gradient norm is NaN or infinite, on every rank alike, and drop what was
accumulated.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema import CacheError
from stages.train_student.data.damaged import DamagedClip
from stages.train_student.logging.rows import (
    DAMAGED_FILE,
    SKIPPED_FILE,
    DamagedRow,
    SkippedRow,
    read_rows,
)
from stages.train_student.parallel.deepspeed import gradient_norm_before_step
from stages.train_student.parallel.process_group import World, gather, on_first_rank
from stages.train_student.step import Losses


class TrainingDivergedError(RuntimeError):
    """Too many losses or gradients in a row are infinite or no number."""


def nan_if_nonfinite(losses: Losses) -> Tensor:
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


class TooManyDamaged(CacheError):  # noqa: N818 (as the cache's other errors)
    """More clips are damaged than `train.max_damaged` allows."""


class DamagedClips:
    """Counts the damaged clips of all ranks, on every rank alike."""

    def __init__(self, *, clips: int, most: float, world: World) -> None:
        """Begin with none, also in a resumed run: the cache may have been repaired.

        Args:
            clips: how many there are to train on.
            most: largest share of them that may be damaged.
        """
        self._clips = clips
        self._most = most
        self._world = world
        self._keys: set[str] = set()

    def of_all_ranks(self, step: int, mine: list[DamagedClip]) -> tuple[DamagedRow, ...]:
        """The damaged clips of every rank's passes; every rank asks, if any has one."""
        return tuple(
            DamagedRow(step=step, key=clip.key, message=clip.message, gone=clip.gone)
            for rank in gather(self._world, mine)
            for clip in rank
        )

    def add(self, rows: tuple[DamagedRow, ...]) -> None:
        """Count the damaged ones; the same clip counts once.

        Clips that were dropped are somebody's decision, and what is left of the cache is whole.

        Raises:
            TooManyDamaged: naming some, and what would help.
        """
        self._keys.update(row.key for row in rows if not row.gone)
        if not rows or len(self._keys) <= self._most * self._clips:
            return
        named = ", ".join(map(repr, sorted(self._keys)[:3]))
        more = f" and {len(self._keys) - 3} more" if len(self._keys) > 3 else ""
        raise TooManyDamaged(
            f"{len(self._keys)} of {self._clips} clips cannot be read, more than "
            f"train.max_damaged={self._most} allows: {named}{more}; {DAMAGED_FILE} in the run's "
            "folder says why. sam2vx-pipeline cache verify finds all of them, cache repair takes "
            "them out, extract-features --retry-failed makes them again; then run the same command "
            "again: it goes on, also without them"
        )
