"""Weight of an auxiliary loss: schedule over steps, and weighting by each clip's noise.

Legend: B clip.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from stages.train_student.objectives.config import AuxiliaryConfig, ObjectiveName
from stages.train_student.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedObjective:
    """A named objective with its weight in the total loss."""

    name: ObjectiveName
    objective: Objective
    settings: AuxiliaryConfig
    steps: int
    """Steps of the whole run, at the end of which a decaying weight reaches `final_weight`."""

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
