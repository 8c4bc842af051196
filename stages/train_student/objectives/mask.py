"""Mask supervision: where the subject is, read off the block's tokens.

Legend: B clip, T frame, H W token grid.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.objective import mean_over_valid, only_valid


def mask_loss(logit_BTHW1: Tensor, share_BTHW: Tensor, valid_BT: Tensor) -> Tensor:
    """Binary cross-entropy, in nats, mean over the tokens of valid frames: loss_B.

    Args:
        logit_BTHW1: the student's, any floating dtype, with gradient.
        share_BTHW: what share of each token the subject covers, 0 to 1.
        valid_BT: bool, the frames that count.

    Raises:
        ValueError: shapes differ.
    """
    if logit_BTHW1.shape != (*share_BTHW.shape, 1):
        raise ValueError(
            f"logits must be {(*share_BTHW.shape, 1)}, one for each token of the masks' frames, "
            f"got {tuple(logit_BTHW1.shape)}"
        )
    dtype = torch.promote_types(logit_BTHW1.dtype, torch.float32)
    logit_BTHW1 = only_valid(logit_BTHW1, valid_BT).to(dtype)
    share_BTHW1 = only_valid(share_BTHW.detach()[..., None], valid_BT).to(dtype)
    loss_BTHW1 = F.binary_cross_entropy_with_logits(logit_BTHW1, share_BTHW1, reduction="none")
    return mean_over_valid(loss_BTHW1[..., 0], valid_BT)


class MaskSupervision:
    """`mask_loss` to the tracked masks of every frame."""

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """One for each frame, whatever else the teacher is."""
        return num_frames

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B."""
        return mask_loss(student_BTHWC, *teacher.mask_share())
