"""Base class of the auxiliary losses with their weights, and reductions over valid maps.

Legend: B clip, T map of the objective, H W token grid, C channel.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.config import AuxiliaryConfig, ObjectiveName

Settings = TypeVar("Settings", bound=AuxiliaryConfig)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC, Generic[Settings]):
    """An auxiliary loss per clip, >= 0, and its weight in the total loss."""

    name: ObjectiveName
    settings: Settings
    steps: int
    """Steps of the whole run, at the end of which a decaying weight reaches `final_weight`."""

    @abstractmethod
    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """Compare the valid maps: loss_B, float32 (float64 for float64 input).

        Gradient flows only to the student. A clip without a valid map has loss 0; values of invalid
        maps affect neither the loss nor its gradient.
        """

    def describe_teacher(self, teacher: Teacher) -> str | None:
        """What a user should know of the teacher before the run goes on; None by default.

        Args:
            teacher: of the first batch.
        """
        return None

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """Number of maps in time that the student's features must have; default the teacher's.

        Args:
            teacher_maps: maps of the stored teacher; None if none is read.
            num_frames: frames per clip.
        """
        assert teacher_maps is not None, f"{self.name} reads a teacher"
        return teacher_maps

    def weight_at(self, step: int) -> float:
        """Weight lambda at `step`, counted from 0.

        Rises from zero over the warm-up, then stays constant or decays to `final_weight` at the
        run's last step.
        """
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.weight * step / settings.warmup_steps
        if settings.schedule == "constant":
            return settings.weight
        last = self.steps - 1
        progress = min(1.0, (step - settings.warmup_steps) / max(1, last - settings.warmup_steps))
        remaining = (
            1.0 - progress
            if settings.schedule == "linear"
            else (1 + math.cos(math.pi * progress)) / 2
        )
        return settings.final_weight + (settings.weight - settings.final_weight) * remaining

    def weights_of(self, timestep_B: Tensor, abar_B: Tensor) -> Tensor:
        """Weight of each clip's loss by its noise: weight_B, with the dtype of `abar_B`.

        Args:
            timestep_B: int64.
            abar_B: signal fraction of the noisy latents.
        """
        first, last = self.settings.timesteps
        inside_B = ((timestep_B >= first) & (timestep_B <= last)).to(abar_B)
        return inside_B * abar_B if self.settings.timestep_weighting == "signal" else inside_B


def mean_over_valid(loss_BTHW: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over the tokens of each clip's valid maps: loss_B, 0 for a clip without one."""
    loss_BT = loss_BTHW.mean((2, 3)).masked_fill(~valid_BT, 0.0)
    return loss_BT.sum(1) / valid_BT.sum(1).clamp(min=1)


def only_valid(values_BTHWC: Tensor, valid_BT: Tensor) -> Tensor:
    """Zero the invalid maps before any arithmetic, since 0 * inf in the backward pass is NaN."""
    return values_BTHWC.masked_fill(~valid_BT[..., None, None, None], 0.0)
