"""Guards against NaN or infinite losses and damaged clips: skip a step, or stop the run.

A non-finite loss is made NaN, so that the gradient reduction spreads it to all ranks. ZeRO 1 to 3
skip an update whose gradient norm is NaN or infinite on every rank, and discard the accumulated
gradients.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema import CacheError
from cache_schema.shown_text import first_few
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import DamagedClip
from stages.train_student.logging.rows import (
    DAMAGED_FILE,
    SKIPPED_FILE,
    DamagedRow,
    SkippedRow,
    iter_rows,
)
from stages.train_student.parallel.deepspeed import gradient_norm_before_step
from stages.train_student.parallel.process_group import World, gather, on_first_rank
from stages.train_student.step import Losses


class TrainingDivergedError(RuntimeError):
    """The loss or gradient is NaN or infinite for too many steps in a row."""


def nan_if_nonfinite(losses: Losses) -> Tensor:
    """Return the total loss, multiplied by NaN if any clip's loss is NaN or infinite.

    Does not synchronise with the device; a finite loss is returned bit for bit.
    """
    parts = [losses.total.detach()[None], losses.diffusion_B, *losses.auxiliary_B.values()]
    finite = torch.cat([part.isfinite() for part in parts]).all()
    return losses.total * torch.where(finite, 1.0, math.nan)


def update(engine: Any) -> float | None:
    """Update the weights from the accumulated gradient, and advance the learning-rate schedule.

    Returns:
        The gradient norm before clipping; None if it is NaN or infinite, in which case the weights
        and the optimiser's moments are unchanged.
    """
    if engine.zero_optimization_stage() == 0:
        norm = gradient_norm_before_step(engine)
        assert norm is not None, "without ZeRO every rank holds the whole gradients"
        if math.isfinite(norm):
            engine.step()
            return norm
        engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)
        engine.step()  # only counts the micro-step
        engine.set_gradient_accumulation_boundary(None)  # derived from the count again
        _advance_schedule(engine)
        return None
    engine.step()
    if engine.was_step_applied():
        return float(engine.get_global_grad_norm())
    _advance_schedule(engine)  # DeepSpeed does not: it assumes an fp16 loss-scaling overflow
    return None


def _advance_schedule(engine: Any) -> None:
    with warnings.catch_warnings():
        # torch warns if the first step is skipped: the scheduler steps before the optimiser.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        engine.lr_scheduler.step()


class ConsecutiveSkipGuard:
    """Stops the run after too many consecutive skipped steps; counts alike on every rank."""

    def __init__(self, config: TrainConfig, steps_done: int, world: World) -> None:
        """Start from the number of skipped steps at the end of the `steps_done` steps so far."""
        self._max_skipped = config.max_skipped_steps
        self._count = on_first_rank(
            world, lambda: _count_trailing_skips(config.run_dir, steps_done)
        )

    def add(self, skipped: SkippedRow | None) -> None:
        """Count a step; None for one that was not skipped.

        Raises:
            TrainingDivergedError: too many in a row; names the step and the clips.
        """
        self._count = 0 if skipped is None else self._count + 1
        if skipped is None or self._count <= self._max_skipped:
            return
        in_a_row = f" for the {_ordinal(self._count)} consecutive step" if self._count > 1 else ""
        raise TrainingDivergedError(
            f"the {skipped.what} is NaN or infinite{in_a_row} at step {skipped.step}, clips "
            f"{', '.join(map(repr, skipped.suspects()))}; training stopped, and the last "
            f"checkpoint is from before. {SKIPPED_FILE} in the run's folder lists the loss and "
            "timestep of every clip: view the clips with sam2vx-pipeline inspect, and exclude them "
            "with train.leave_out; if they are sound, a lower train.optimizer.learning_rate or "
            "train.deepspeed.precision fp32 may help"
        )


def _count_trailing_skips(run_dir: Path, steps_done: int) -> int:
    skipped = {row["step"] for row in iter_rows(run_dir / SKIPPED_FILE)}
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


class DamagedClipGuard:
    """Stops the run after too many damaged clips; counts those of all ranks on every rank."""

    def __init__(self, *, clips: int, max_fraction: float, world: World) -> None:
        """Start from zero, also when a run is resumed: the cache may have been repaired.

        Args:
            clips: number of training clips.
            max_fraction: largest fraction of them that may be damaged.
        """
        self._clips = clips
        self._max_fraction = max_fraction
        self._world = world
        self._keys: set[str] = set()

    def gather_rows(self, step: int, mine: list[DamagedClip]) -> tuple[DamagedRow, ...]:
        """The damaged clips of all ranks; every rank must call this if any rank has one."""
        return tuple(
            DamagedRow(step=step, key=clip.key, message=clip.message, gone=clip.gone)
            for rank in gather(self._world, mine)
            for clip in rank
        )

    def add(self, rows: tuple[DamagedRow, ...]) -> None:
        """Count the damaged clips, each once.

        Clips that were dropped from the cache do not count: that was deliberate, and the rest of
        the cache is intact.

        Raises:
            TooManyDamaged: more than allowed; names some, and how to repair the cache.
        """
        self._keys.update(row.key for row in rows if not row.gone)
        if not rows or len(self._keys) <= self._max_fraction * self._clips:
            return
        named = first_few([repr(key) for key in sorted(self._keys)], 3)
        raise TooManyDamaged(
            f"{len(self._keys)} of {self._clips} clips cannot be read, more than "
            f"train.max_damaged={self._max_fraction} allows: {named}; {DAMAGED_FILE} in the "
            "run's folder has the reasons. sam2vx-pipeline cache verify finds all of them, cache "
            "repair removes them, extract-features --retry-failed extracts them again; then run "
            "the same command again: it resumes, also without them"
        )
