"""What a training did; `train` fills it in, the command shows it."""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.train_student.loss_record import LossRow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a training did, for the end of the command."""

    run_dir: Path
    steps_done: int
    resumed_from: int | None
    """Steps that were done before; None for a run that started now."""
    first: LossRow
    last: LossRow
    seconds_per_step: float | None
    """Median over this process's steps; None if it made none."""
    peak_memory_bytes: int
    """Of the GPU if there is one, otherwise of this process."""
    export: Path
    clips: int
    left_out: dict[str, int]
    """Clips of each kind that some other kind lacks."""
    left_out_by_name: int
    """Clips of every kind that `train.leave_out` names."""
    already_finished: bool


def peak_memory_bytes() -> int:
    """The most memory this process has used: of the GPU if there is one, otherwise of the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
