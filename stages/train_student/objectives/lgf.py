"""Local Gram Flow: how each token relates to its window in the next frame.

Legend: B clip, T map of the teacher, P pair of maps, H W token grid, C channel, K neighbour.
"""

from dataclasses import dataclass

from torch import Tensor

from stages.local_gram_flow import (
    Directions,
    Divergence,
    Kernel,
    gram_flow_loss,
    local_gram_flow,
)
from stages.train_student.objectives.objective import only_valid
from stages.train_student.teacher import Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalGramFlow:
    """KL or squared error between the student's and the teacher's Gram flow, in float32.

    Source: Structure From Tracking, arXiv 2512.11792.
    """

    radius: int
    temperature: float
    divergence: Divergence
    directions: Directions
    foreground_weight: float
    kernel: Kernel = "torch"

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """As many as the teacher has."""
        assert teacher_maps is not None, "lgf reads a teacher"
        return teacher_maps

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B; a pair of maps counts if both are valid."""
        valid_BT = teacher.valid_BT
        assert valid_BT is not None, "a teacher says which maps are valid"
        weight_BPHW = None
        if self.foreground_weight != 1.0:
            weight_BPHW = teacher.token_weight(self.foreground_weight)[:, :-1]
        return gram_flow_loss(
            local_gram_flow(only_valid(student_BTHWC, valid_BT), self.radius, kernel=self.kernel),
            teacher.gram_flow(self.radius, self.directions),
            temperature=self.temperature,
            divergence=self.divergence,
            valid_BP=valid_BT[:, :-1] & valid_BT[:, 1:],
            token_weight_BPHW=weight_BPHW,
        )
