"""The interface of an auxiliary loss, and reductions over valid maps.

Legend: B clip, T map of the objective, H W token grid, C channel.
"""

from typing import Protocol

from torch import Tensor

from stages.train_student.model.teacher import Teacher


class Objective(Protocol):
    """A loss per clip, >= 0."""

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """Number of maps in time that the student's features must have.

        Args:
            teacher_maps: maps of the stored teacher; None if none is read.
            num_frames: frames per clip.
        """

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """Compare the valid maps: loss_B, float32 (float64 for float64 input).

        Gradient flows only to the student. A clip without a valid map has loss 0; values of invalid
        maps affect neither the loss nor its gradient.
        """


def mean_over_valid(loss_BTHW: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over the tokens of each clip's valid maps: loss_B, 0 for a clip without one."""
    loss_BT = loss_BTHW.mean((2, 3)).masked_fill(~valid_BT, 0.0)
    return loss_BT.sum(1) / valid_BT.sum(1).clamp(min=1)


def only_valid(values_BTHWC: Tensor, valid_BT: Tensor) -> Tensor:
    """Zero the invalid maps before any arithmetic, since 0 * inf in the backward pass is NaN."""
    return values_BTHWC.masked_fill(~valid_BT[..., None, None, None], 0.0)
