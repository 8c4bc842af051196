"""Auxiliary losses between the student's projected features and the cached teacher.

One class per objective; `build_objective` is the only place that knows their names.

Legend: B clip, T map of the teacher, P pair of maps, H W token grid, C channel, K neighbour.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stages.local_gram_flow import Divergence, gram_flow_loss, local_gram_flow
from stages.train_student.config import TrainConfig
from stages.train_student.teacher import Teacher


class Objective(Protocol):
    """A scalar loss, zero at best."""

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """Compare the maps that are valid; gradient flows to the student alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalGramFlow:
    """Local Gram Flow: how each token relates to its window in the next frame.

    Source: Structure From Tracking, arXiv 2512.11792.
    """

    radius: int
    temperature: float
    divergence: Divergence

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """KL or squared error between the two Gram flows, averaged; computed in float32.

        A pair of maps counts if both are valid.
        """
        teacher_BPHWK = teacher.gram_flow(self.radius)
        student_BPHWK = local_gram_flow(student_BTHWC, self.radius)
        return gram_flow_loss(
            student_BPHWK,
            teacher_BPHWK,
            temperature=self.temperature,
            divergence=self.divergence,
            valid_BP=teacher.valid_BT[:, :-1] & teacher.valid_BT[:, 1:],
        )


def build_objective(config: TrainConfig) -> Objective | None:
    """The objective that `config` names; None for plain fine-tuning."""
    if "lgf" not in config.objectives:
        return None
    lgf = config.lgf
    return LocalGramFlow(radius=lgf.radius, temperature=lgf.temperature, divergence=lgf.divergence)
