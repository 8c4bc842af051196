"""REPA objective: cosine similarity of each projected token to the teacher's features.

With CREPA's neighbouring maps and iREPA's norm of the teacher, where they are set.

Legend: B clip, T map of the teacher, H W token grid, G channel of the teacher.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.config import RepaConfig
from stages.train_student.objectives.objective import Objective, mean_over_valid, only_valid

_EPSILON = 1e-6
"""Added to the standard deviation, as in iREPA's code."""


def cosine_loss(
    student_BTHWG: Tensor,
    teacher_BTHWG: Tensor,
    valid_BT: Tensor,
    *,
    distance: int = 0,
    decay: float = 1.0,
) -> Tensor:
    """1 - cosine similarity to the teacher, averaged over the tokens of valid maps: loss_B.

    With `distance`, CREPA: for each map f also exp(-|k - f| / decay) * (1 - cosine similarity to
    the same token of map k), summed over the valid maps k up to `distance` before and after it.

    Args:
        student_BTHWG: any floating dtype, with gradient.
        teacher_BTHWG: same shape; treated as constant.
        valid_BT: bool, valid maps.
        distance: how many neighbours on each side are compared; 0 is REPA.
        decay: tau, in maps.

    Raises:
        ValueError: shapes differ.

    Source: REPA, arXiv 2410.06940; CREPA, arXiv 2506.09229, formula of https://crepavideo.github.io
    (its code is not public), which sums over frames instead of averaging.
    """
    if student_BTHWG.shape != teacher_BTHWG.shape:
        raise ValueError(
            "student and teacher features must have one shape [clip, map, height, width, channel], "
            f"got {tuple(student_BTHWG.shape)} and {tuple(teacher_BTHWG.shape)}"
        )
    dtype = torch.promote_types(student_BTHWG.dtype, torch.float32)
    student = F.normalize(only_valid(student_BTHWG, valid_BT).to(dtype), dim=-1)
    teacher = F.normalize(only_valid(teacher_BTHWG.detach(), valid_BT).to(dtype), dim=-1)
    loss_BTHW = 1.0 - torch.linalg.vecdot(student, teacher)
    maps = student.shape[1]
    for offset in range(1, min(distance, maps - 1) + 1):
        weight = math.exp(-offset / decay)
        for here, there in (
            (slice(None, -offset), slice(offset, None)),
            (slice(offset, None), slice(None, -offset)),
        ):
            excess = 1.0 - torch.linalg.vecdot(student[:, here], teacher[:, there])
            excess = excess.masked_fill(~valid_BT[:, there, None, None], 0.0)
            before = offset if here.start is not None else 0
            padding = (0, 0, 0, 0, before, offset - before)
            loss_BTHW = loss_BTHW + weight * F.pad(excess, padding)
    return mean_over_valid(loss_BTHW, valid_BT)


@torch.no_grad()
def spatially_normalised(features_BTHWG: Tensor, gamma: float) -> Tensor:
    """(x - gamma * mean) / (std + 1e-6) over the tokens of each map, in at least float32.

    Source: iREPA, arXiv 2512.10794; End2End-Diffusion/iREPA@99ad4ac, jit/spnorm.py (the standard
    deviation is the unbiased one).
    """
    dtype = torch.promote_types(features_BTHWG.dtype, torch.float32)
    values = features_BTHWG.to(dtype)
    std, mean = torch.std_mean(values, dim=(2, 3), keepdim=True)
    return (values - gamma * mean) / (std + _EPSILON)


class Repa(Objective[RepaConfig]):
    """`cosine_loss` against the teacher's features."""

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B."""
        assert teacher.valid_BT is not None, "a teacher says which maps are valid"
        settings, features_BTHWG = self.settings, teacher.features_BTHWG
        if settings.spatial_norm is not None:
            features_BTHWG = spatially_normalised(features_BTHWG, settings.spatial_norm)
        return cosine_loss(
            student_BTHWC,
            features_BTHWG,
            teacher.valid_BT,
            distance=settings.neighbour_distance,
            decay=settings.neighbour_decay,
        )
