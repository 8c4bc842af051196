"""Summary of a training run."""

from dataclasses import dataclass
from pathlib import Path

from stages.train_student.logging.rows import LossRow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """Outcome of a training run."""

    run_dir: Path
    steps_done: int
    resumed_from: int | None
    """Steps that were done before this start; None for a new run."""
    first: LossRow | None
    """First logged step; None if every step was skipped."""
    last: LossRow | None
    skipped_steps: int
    """Skipped steps of the whole run."""
    damaged_clips: int
    """Clips that were damaged at some step of the whole run."""
    gone_clips: int
    """Clips that were removed from the cache, or extracted again, during the run."""
    seconds_per_step: float | None
    """Mean over the steps since this start; None if there were none."""
    peak_memory_bytes: int
    """Of the GPU if there is one, otherwise of this process."""
    export: Path
    clips: int
    excluded: dict[str, int]
    """Number of clips of each kind of store that are missing from another kind."""
    excluded_by_name: int
    """Number of clips excluded by `train.leave_out`."""
    already_finished: bool
