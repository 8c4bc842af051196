"""Gram-flow loss between student and teacher, and the motion and entropy of a Gram flow.

Legend: B clip, P frame pair, H W token grid, K neighbour.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.local_gram_flow.windows import (
    neighbour_mask,
    neighbour_offsets,
    radius_of_window,
    reverse_pairs,
)

Divergence = Literal["kl", "l2"]


def gram_flow_loss(
    student_BPHWK: Tensor,
    teacher_BPHWK: Tensor,
    *,
    temperature: float,
    divergence: Divergence,
    valid_BP: Tensor | None = None,
    token_weight_BPHW: Tensor | None = None,
) -> Tensor:
    """Divergence between the student's and the teacher's Gram flow, per clip.

    Averaged over tokens and frame pairs. `kl`: KL(P_teacher || P_student) in nats,
    P = softmax(s / temperature) over the neighbours inside the grid. `l2`: mean squared difference
    of the similarities of those neighbours.

    Args:
        student_BPHWK: similarities of the student (`local_gram_flow`), with gradient.
        teacher_BPHWK: similarities of the teacher, before the softmax; treated as constant.
        temperature: softmax temperature; used by `kl` only.
        divergence: `kl` or `l2` (ablation).
        valid_BP: bool mask of valid pairs; None means all. Each clip is averaged over its own valid
            pairs, and a clip without any has loss 0, so the batch mean does not depend on how the
            batch is split.
        token_weight_BPHW: weight >= 0 of each token: a clip's loss is the weighted mean over the
            tokens of its valid pairs, 0 if all weights are 0. None weights all equally.

    Returns:
        loss_B >= 0, zero for equal Gram flows; float32, or float64 for float64 input. Values of
        invalid pairs, finite or not, affect neither the loss nor its gradient.

    Raises:
        ValueError: shapes differ, K is not a window size, or `valid_BP` is not boolean.

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
    if token_weight_BPHW is not None:
        _check_weight(token_weight_BPHW, student_BPHWK)
        token_weight_BPHW = token_weight_BPHW.detach().to(dtype)
    if valid_BP is not None:
        _check_valid(valid_BP, student_BPHWK)
        # Before any arithmetic: 0 * inf in the backward pass is NaN.
        unused = ~valid_BP[..., None, None]
        student_BPHWK = student_BPHWK.masked_fill(unused[..., None], 0.0)
        teacher_BPHWK = teacher_BPHWK.masked_fill(unused[..., None], 0.0)
        if token_weight_BPHW is not None:
            token_weight_BPHW = token_weight_BPHW.masked_fill(unused, 0.0)
    if divergence == "l2":
        squared = (student_BPHWK - teacher_BPHWK).square().masked_fill(~mask_HWK, 0.0)
        loss_BPHW = squared.sum(-1) / mask_HWK.sum(-1)
    else:
        log_student = _log_softmax_inside(student_BPHWK, mask_HWK, temperature)
        log_teacher = _log_softmax_inside(teacher_BPHWK, mask_HWK, temperature)
        terms = log_teacher.exp() * (log_teacher - log_student)
        loss_BPHW = terms.masked_fill(~mask_HWK, 0.0).sum(-1)
    if token_weight_BPHW is not None:
        weight_B = token_weight_BPHW.sum((1, 2, 3))
        total_B = (token_weight_BPHW * loss_BPHW).sum((1, 2, 3))
        return total_B / weight_B.clamp(min=torch.finfo(dtype).tiny)
    loss_BP = loss_BPHW.mean((2, 3))
    if valid_BP is None:
        return loss_BP.mean(1)
    # Invalid pairs were zeroed in both flows, so they add 0 to the sum.
    return loss_BP.sum(1) / valid_BP.sum(1).clamp(min=1)


def _check_valid(valid_BP: Tensor, similarities_BPHWK: Tensor) -> None:
    if valid_BP.dtype != torch.bool or valid_BP.shape != similarities_BPHWK.shape[:2]:
        raise ValueError(
            f"valid_BP must be bool {tuple(similarities_BPHWK.shape[:2])}, one per clip and frame "
            f"pair, got {valid_BP.dtype} {tuple(valid_BP.shape)}"
        )


def _check_weight(token_weight_BPHW: Tensor, similarities_BPHWK: Tensor) -> None:
    if token_weight_BPHW.shape != similarities_BPHWK.shape[:4]:
        raise ValueError(
            f"token_weight_BPHW must be {tuple(similarities_BPHWK.shape[:4])}, one for each clip, "
            f"frame pair and token, got {tuple(token_weight_BPHW.shape)}"
        )


def _log_softmax_inside(similarities_BPHWK: Tensor, mask_HWK: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the neighbours inside the grid; the others are large but finite."""
    floor = torch.finfo(similarities_BPHWK.dtype).min
    return F.log_softmax((similarities_BPHWK / temperature).masked_fill(~mask_HWK, floor), dim=-1)


def flow_entropy(similarities_BPHWK: Tensor, temperature: float) -> Tensor:
    """Entropy of each token's Gram flow, relative to that of a uniform choice.

    Returns:
        entropy_BPHW from 0, one neighbour has all the probability, to 1, the Gram flow says nothing
        about where the token goes; 0 for a window of a single neighbour. float32, or float64 for
        float64 input.
    """
    _, _, H, W, K = similarities_BPHWK.shape
    mask_HWK = neighbour_mask(H, W, radius_of_window(K), similarities_BPHWK.device)
    dtype = torch.promote_types(similarities_BPHWK.dtype, torch.float32)
    log_probability = _log_softmax_inside(similarities_BPHWK.to(dtype), mask_HWK, temperature)
    terms = (log_probability.exp() * log_probability).masked_fill(~mask_HWK, 0.0)
    highest_HW = mask_HWK.sum(-1).to(dtype).log()
    return -terms.sum(-1) / highest_HW.clamp(min=torch.finfo(dtype).tiny)


def flow_probability(similarities_BPHWK: Tensor, temperature: float) -> Tensor:
    """Softmax of a Gram flow over the neighbours inside the grid, as the loss compares it.

    Returns:
        probability_BPHWK, 0 for neighbours outside the grid; float32.
    """
    _, _, H, W, K = similarities_BPHWK.shape
    mask_HWK = neighbour_mask(H, W, radius_of_window(K), similarities_BPHWK.device)
    log_probability = _log_softmax_inside(similarities_BPHWK.float(), mask_HWK, temperature)
    return log_probability.exp().masked_fill(~mask_HWK, 0.0)


def implied_flow(similarities_BPHWK: Tensor, temperature: float) -> Tensor:
    """Motion implied by a Gram flow: the expected offset under softmax(s / temperature).

    Returns:
        flow_BPHW2, (dx, dy) in tokens from each frame to the next; right and down are positive.
    """
    radius = radius_of_window(similarities_BPHWK.shape[-1])
    offsets_K2 = neighbour_offsets(radius, similarities_BPHWK.device)
    return flow_probability(similarities_BPHWK, temperature) @ offsets_K2.float()


def implied_motion(similarities_BPHWK: Tensor, temperature: float) -> Tensor:
    """Motion implied by a Gram flow, without what its frames alone imply: 0 for a still video.

    Tokens beside an outline resemble those on their own side of it, so that their expected offset
    points there without any motion. The pair read in reverse has the same bias and the opposite
    motion: half the difference of the two is returned. A token whose content leaves it altogether
    counts half. Neighbours whose mirror image is outside the
    grid are left out, because a window cut on one side is biased too.

    Returns:
        motion_BPHW2, (dx, dy) in tokens from each frame to the next; right and down are positive.
    """
    _, _, H, W, K = similarities_BPHWK.shape
    inside_HWK = neighbour_mask(H, W, radius_of_window(K), similarities_BPHWK.device)
    outside_HWK = ~(inside_HWK & inside_HWK.flip(-1))
    forward, backward = (
        implied_flow(flow_BPHWK.masked_fill(outside_HWK, -1e4 * temperature), temperature)
        for flow_BPHWK in (similarities_BPHWK, reverse_pairs(similarities_BPHWK))
    )
    return (forward - backward) / 2
