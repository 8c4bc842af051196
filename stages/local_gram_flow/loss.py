"""What a Gram flow says: the loss between a student's and a teacher's, and the implied motion.

Legend: B clip, P frame pair, H W token grid, K neighbour.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.local_gram_flow.similarities import (
    neighbour_mask,
    neighbour_offsets,
    radius_of_window,
)

Divergence = Literal["kl", "l2"]


def gram_flow_loss(
    student_BPHWK: Tensor, teacher_BPHWK: Tensor, *, temperature: float, divergence: Divergence
) -> Tensor:
    """How differently student and teacher move, averaged over clips, frame pairs and tokens.

    `kl`: KL(P_teacher || P_student) in nats, P = softmax(s / temperature) over the neighbours that
    lie inside the grid. `l2`: mean squared difference of the similarities of those neighbours.

    Args:
        student_BPHWK: similarities of the student (`local_gram_flow`), with gradient.
        teacher_BPHWK: similarities of the teacher, before the softmax; no gradient flows to them.
        temperature: of the softmax; used by `kl` alone.
        divergence: `kl` (the paper) or `l2` (ablation).

    Returns:
        A scalar >= 0, zero where both move alike; float32, or float64 if given it.

    Raises:
        ValueError: shapes differ, or the last axis is no window.

    Source: Structure From Tracking, arXiv 2512.11792.
    """
    if student_BPHWK.shape != teacher_BPHWK.shape:
        raise ValueError(
            "student and teacher similarities must have one shape [clip, pair, height, width, "
            f"neighbour], got {tuple(student_BPHWK.shape)} and {tuple(teacher_BPHWK.shape)}"
        )
    _, _, H, W, K = student_BPHWK.shape
    mask_HWK = neighbour_mask(H, W, radius_of_window(K), student_BPHWK.device)
    dtype = torch.promote_types(student_BPHWK.dtype, torch.float32)
    student_BPHWK = student_BPHWK.to(dtype)
    teacher_BPHWK = teacher_BPHWK.detach().to(dtype)
    if divergence == "l2":
        squared = (student_BPHWK - teacher_BPHWK).square().masked_fill(~mask_HWK, 0.0)
        return (squared.sum(-1) / mask_HWK.sum(-1)).mean()
    log_student = _log_softmax_inside(student_BPHWK, mask_HWK, temperature)
    log_teacher = _log_softmax_inside(teacher_BPHWK, mask_HWK, temperature)
    terms = log_teacher.exp() * (log_teacher - log_student)
    return terms.masked_fill(~mask_HWK, 0.0).sum(-1).mean()


def _log_softmax_inside(similarities_BPHWK: Tensor, mask_HWK: Tensor, temperature: float) -> Tensor:
    """Log-probabilities over the neighbours inside the grid; the others hold a finite floor."""
    floor = torch.finfo(similarities_BPHWK.dtype).min
    return F.log_softmax((similarities_BPHWK / temperature).masked_fill(~mask_HWK, floor), dim=-1)


def implied_flow(similarities_BPHWK: Tensor, temperature: float) -> Tensor:
    """The motion a Gram flow implies: the expected offset under softmax(s / temperature).

    Returns:
        flow_BPHW2, (dx, dy) in tokens from each frame to the next; right and down are positive.
    """
    _, _, H, W, K = similarities_BPHWK.shape
    radius = radius_of_window(K)
    device = similarities_BPHWK.device
    mask_HWK = neighbour_mask(H, W, radius, device)
    log_probability = _log_softmax_inside(similarities_BPHWK.float(), mask_HWK, temperature)
    probability_BPHWK = log_probability.exp().masked_fill(~mask_HWK, 0.0)
    return probability_BPHWK @ neighbour_offsets(radius, device).float()
