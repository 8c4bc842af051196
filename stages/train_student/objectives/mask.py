"""Mask supervision objective: the subject's mask predicted from the block's tokens.

Legend: B clip, T frame, H W token grid.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.config import MaskConfig
from stages.train_student.objectives.objective import Objective, mean_over_valid, only_valid


def mask_loss(logit_BTHW1: Tensor, coverage_BTHW: Tensor, valid_BT: Tensor) -> Tensor:
    """Binary cross-entropy in nats, averaged over the tokens of valid frames: loss_B.

    Args:
        logit_BTHW1: the student's logits, any floating dtype, with gradient.
        coverage_BTHW: fraction of each token that the subject covers, 0 to 1.
        valid_BT: bool, valid frames.

    Raises:
        ValueError: shapes differ.
    """
    if logit_BTHW1.shape != (*coverage_BTHW.shape, 1):
        raise ValueError(
            f"logits must be {(*coverage_BTHW.shape, 1)}, one per token of the masks' frames, "
            f"got {tuple(logit_BTHW1.shape)}"
        )
    dtype = torch.promote_types(logit_BTHW1.dtype, torch.float32)
    logit_BTHW1 = only_valid(logit_BTHW1, valid_BT).to(dtype)
    coverage_BTHW1 = only_valid(coverage_BTHW.detach()[..., None], valid_BT).to(dtype)
    loss_BTHW1 = F.binary_cross_entropy_with_logits(logit_BTHW1, coverage_BTHW1, reduction="none")
    return mean_over_valid(loss_BTHW1[..., 0], valid_BT)


class MaskSupervision(Objective[MaskConfig]):
    """`mask_loss` against the tracked masks of every frame."""

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """One per frame, whatever the teacher's rate."""
        return num_frames

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B."""
        return mask_loss(student_BTHWC, *teacher.mask_coverage())
