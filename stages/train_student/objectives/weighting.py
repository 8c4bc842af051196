"""How much an auxiliary loss counts: by the step, and by each clip's noise; `TrainingStep` asks.

Legend: B clip.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from stages.train_student.objectives.config import AuxiliaryConfig, ObjectiveName
from stages.train_student.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedObjective:
    """An objective of a run, by its name, with its share of the total."""

    name: ObjectiveName
    objective: Objective
    settings: AuxiliaryConfig
    steps: int
    """Of the whole run: where a falling weight ends."""

    def weight_at(self, step: int) -> float:
        """Its share lambda of the total at step number `step`, from 0.

        Rises from zero over the warm-up; then stays, or falls until the run's last step has
        `final_weight`.
        """
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.weight * step / settings.warmup_steps
        if settings.schedule == "constant":
            return settings.weight
        last = self.steps - 1
        done = min(1.0, (step - settings.warmup_steps) / max(1, last - settings.warmup_steps))
        left = 1.0 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return settings.final_weight + (settings.weight - settings.final_weight) * left

    def weights_of(self, timestep_B: Tensor, abar_B: Tensor) -> Tensor:
        """How much each clip's loss counts, by its noise: weight_B, like `abar_B`.

        Args:
            timestep_B: int64.
            abar_B: the share of the picture in the noisy latents.
        """
        first, last = self.settings.timesteps
        inside_B = ((timestep_B >= first) & (timestep_B <= last)).to(abar_B)
        return inside_B * abar_B if self.settings.timestep_weighting == "signal" else inside_B
