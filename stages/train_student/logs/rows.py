"""What is written down of each step: the training loop makes these, `RunLog` writes them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.train_student.logs.row_file import each_of

CONFIG_FILE = "config.yaml"
"""The settings a run was last started with."""
LOSSES_FILE = "losses.jsonl"
PERFORMANCE_FILE = "performance.jsonl"
SKIPPED_FILE = "skipped_steps.jsonl"
DAMAGED_FILE = "damaged_clips.jsonl"

TIMESTEP_BINS = 10
"""The schedule's timesteps are told in so many equal parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRow:
    """One optimiser step, averaged over the batch; independent of timing and of who computed it."""

    step: int
    """From 1: the number of steps done with it."""
    loss: float
    diffusion: float
    auxiliary: dict[str, float]
    """By objective, before weighting; empty for plain fine-tuning."""
    grad_norm: float
    """Before clipping."""
    lr: float
    by_timestep: dict[str, list[float | None]]
    """Ten values each, the first for the least noise: `count` of clips, and the means of
    `diffusion` and of every objective, null where no clip fell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceRow:
    """How long a step took and what it used: the slowest rank's wait, the fullest rank's memory."""

    step: int
    seconds: float
    wait_seconds: float
    """Of `seconds`, spent waiting for the loader."""
    clips_per_second: float
    peak_memory_bytes: int
    """Since the process started: of the GPU if there is one, otherwise of the process."""
    share_of_peak: float | None
    """Of the GPU's stated FLOP/s, without counting recomputed work; null where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedClip:
    """One clip of a step that was skipped."""

    key: str
    timestep: int
    diffusion: float | str
    """As text where JSON has no number for it: nan, inf."""
    auxiliary: dict[str, float | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRow:
    """A step that left the weights as they were."""

    step: int
    what: str
    """What was no number: `loss` or `gradient`."""
    clips: tuple[SkippedClip, ...]
    """Of every rank."""

    def suspects(self) -> list[str]:
        """Keys of the clips whose own losses are no number; of all clips where every one is."""
        bad = [clip.key for clip in self.clips if _is_text(clip)]
        return sorted(set(bad or [clip.key for clip in self.clips]))


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRow:
    """A clip that could not be read; another one took its place."""

    step: int
    key: str
    message: str
    gone: bool
    """Whether it was taken out of the cache, or made again, while the run went on: no damage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRow:
    """A line of validation.jsonl: means over the held-out clips; null where one is no number."""

    step: int
    """Steps done; 0 is the model before training."""
    clips: int
    """How many could be read."""
    diffusion: float | None
    """Over all timesteps alike."""
    auxiliary: dict[str, float | None]
    """By objective, before weighting."""
    by_timestep: dict[str, list[float | None]]
    """Lists of equal length: `timestep`, `diffusion`, and every objective."""

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.by_timestep.values()}
        if {"timestep", "diffusion", *self.auxiliary} - self.by_timestep.keys() or len(lengths) > 1:
            raise ValueError("by_timestep needs a value of every loss for each timestep")
        if None in self.by_timestep["timestep"]:
            raise ValueError("by_timestep.timestep needs numbers alone")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """Everything about one step."""

    performance: PerformanceRow
    losses: LossRow | None
    """None for a skipped step."""
    skipped: SkippedRow | None
    damaged: tuple[DamagedRow, ...]


def read_losses(run_dir: Path) -> Iterator[LossRow]:
    """Every whole line of a run's losses, one at a time; none where there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    return each_of(run_dir / LOSSES_FILE, LossRow)


def as_dict(row: Any) -> dict[str, Any]:
    """A row as it is written."""
    return asdict(row)


def _is_text(clip: SkippedClip) -> bool:
    return any(isinstance(value, str) for value in (clip.diffusion, *clip.auxiliary.values()))
