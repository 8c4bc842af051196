"""REPA objective: cosine similarity of each projected token to the teacher's features.

Legend: B clip, T map of the teacher, H W token grid, G fused channel.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.config import RepaConfig
from stages.train_student.objectives.objective import Objective, mean_over_valid, only_valid


def cosine_loss(student_BTHWG: Tensor, teacher_BTHWG: Tensor, valid_BT: Tensor) -> Tensor:
    """1 - cosine similarity to the teacher, averaged over the tokens of valid maps: loss_B.

    Args:
        student_BTHWG: any floating dtype, with gradient.
        teacher_BTHWG: same shape; treated as constant.
        valid_BT: bool, valid maps.

    Raises:
        ValueError: shapes differ.

    Source: REPA, arXiv 2410.06940.
    """
    if student_BTHWG.shape != teacher_BTHWG.shape:
        raise ValueError(
            "student and teacher features must have one shape [clip, map, height, width, channel], "
            f"got {tuple(student_BTHWG.shape)} and {tuple(teacher_BTHWG.shape)}"
        )
    dtype = torch.promote_types(student_BTHWG.dtype, torch.float32)
    student = F.normalize(only_valid(student_BTHWG, valid_BT).to(dtype), dim=-1)
    teacher = F.normalize(only_valid(teacher_BTHWG.detach(), valid_BT).to(dtype), dim=-1)
    return mean_over_valid(1.0 - torch.linalg.vecdot(student, teacher), valid_BT)


class Repa(Objective[RepaConfig]):
    """`cosine_loss` against the teacher's fused features."""

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B."""
        assert teacher.valid_BT is not None, "a teacher says which maps are valid"
        return cosine_loss(student_BTHWC, teacher.features_BTHWG, teacher.valid_BT)
