"""How well the forward and the backward track agree; `subject_tracking` rates clips by it."""

# Legend: T frame, H W mask.

import torch
from torch import Tensor


def cycle_consistency(
    forward_logits_THW: Tensor, backward_logits_THW: Tensor, seen_by_both_T: Tensor
) -> float | None:
    """Mean overlap of the two tracks' masks over the frames on which both see the subject.

    The overlap is the intersection over the union of the pixels with positive logits.

    Args:
        forward_logits_THW: masks of the forward track by frame.
        backward_logits_THW: masks of the backward track for the same frames in the same order.
        seen_by_both_T: bool, the frames that count. A mask that counts is not empty.

    Returns:
        0 to 1, or None when no frame counts.

    Raises:
        ValueError: the shapes differ.
    """
    expected = (len(seen_by_both_T), *forward_logits_THW.shape[1:])
    for logits_THW in (forward_logits_THW, backward_logits_THW):
        if tuple(logits_THW.shape) != expected:
            raise ValueError(
                f"masks of both tracks must have the shape {expected} (frame, height, width), got "
                f"{tuple(forward_logits_THW.shape)} and {tuple(backward_logits_THW.shape)}"
            )
    counted_T = seen_by_both_T.to(forward_logits_THW.device)
    if not counted_T.any():
        return None
    forward_THW = forward_logits_THW[counted_T] > 0
    backward_THW = backward_logits_THW[counted_T] > 0
    shared_T = (forward_THW & backward_THW).sum(dim=(1, 2))
    covered_T = (forward_THW | backward_THW).sum(dim=(1, 2))
    return (shared_T.to(torch.float64) / covered_T).mean().item()
