"""What a training did; `train` fills it in, the command shows it."""

from dataclasses import dataclass
from pathlib import Path

from stages.train_student.logging.rows import LossRow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a training did, for the end of the command."""

    run_dir: Path
    steps_done: int
    resumed_from: int | None
    """Steps that were done before; None for a run that started now."""
    first: LossRow | None
    """None if every step was skipped."""
    last: LossRow | None
    skipped_steps: int
    """Steps of the whole run that left the weights as they were."""
    damaged_clips: int
    """Clips that were damaged at some step of the whole run."""
    gone_clips: int
    """Clips that were taken out of the cache, or made again, while the run went on."""
    seconds_per_step: float | None
    """Mean over this process's steps, as the page of the run has it; None if it made none."""
    peak_memory_bytes: int
    """Of the GPU if there is one, otherwise of this process."""
    export: Path
    clips: int
    left_out: dict[str, int]
    """Clips of each kind that some other kind lacks."""
    left_out_by_name: int
    """Clips of every kind that `train.leave_out` names."""
    already_finished: bool
