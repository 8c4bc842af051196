"""What an auxiliary loss is; `TrainingStep` calls it, `build` knows which there are.

Legend: B clip, T map of the objective, H W token grid, C channel.
"""

from typing import Protocol

from torch import Tensor

from stages.train_student.model.teacher import Teacher


class Objective(Protocol):
    """A loss for each clip, zero at best."""

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """How many maps in time the student's features must have to be compared.

        Args:
            teacher_maps: of the stored teacher; None where none is read.
            num_frames: of the clips.
        """

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """Compare the maps that are valid: loss_B, float32 (float64 if given it).

        Gradient flows to the student alone. A clip without a valid map has the loss 0; what maps
        that do not count hold changes neither the loss nor its gradient.
        """


def mean_over_valid(loss_BTHW: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over the tokens of each clip's valid maps: loss_B, 0 for a clip without one."""
    loss_BT = loss_BTHW.mean((2, 3)).masked_fill(~valid_BT, 0.0)
    return loss_BT.sum(1) / valid_BT.sum(1).clamp(min=1)


def only_valid(values_BTHWC: Tensor, valid_BT: Tensor) -> Tensor:
    """The same with zeros in the maps that do not count, before any arithmetic.

    A product of 0 and infinity in the backward pass is no number.
    """
    return values_BTHWC.masked_fill(~valid_BT[..., None, None, None], 0.0)
