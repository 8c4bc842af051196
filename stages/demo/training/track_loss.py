"""Loss of a tracker on drawn examples, from a prompt on their first frame."""

# Legend: B example, T frame, K frame of any example, S side of SAM2's square input, M mask token, N
# position on a level, P point, C channel, H W pixels.

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.demo.training.drawn_clips import NUM_FRAMES
from stages.demo.training.figure_tracks import PROMPT_KINDS, FigureTracks, points_of
from stages.sam2_tracking.inputs import normalise
from stages.sam2_tracking.model import FrameStep
from stages.sam2_tracking.sam2_model import Sam2Model, track_step
from stages.sam2_tracking.step import enlarge_mask

_PROMPT_SHARES = (0.5, 0.2, 0.2, 0.1)
"""Fractions of the steps with each of `PROMPT_KINDS`."""
_MASK_WEIGHT = 5.0
"""Weight of the cross-entropy of masks relative to the Dice loss, IoU and object score."""
_MIN_PIXELS = 16
"""Visible pixels of a subject; with fewer, but not none, its object score is not trained."""


def track_loss(
    model: Any, tracks: FigureTracks, random: np.random.Generator
) -> tuple[Tensor, float]:
    """Track the examples from a prompt on their first frame.

    The loss of a frame is that of SAM2 (arXiv:2408.00714, appendix D.2) with cross-entropy in place
    of focal loss: cross-entropy and Dice of the best of the masks, absolute error of the predicted
    IoUs, and cross-entropy of the object score.

    Args:
        model: A SAM2Base.
        tracks: The examples.
        random: Chooses the kind of prompt, boxes and points.

    Returns:
        Mean loss over the frames, and mean IoU of the tracked masks where a subject is visible.
    """
    size, num_frames = tracks.masks_BTSS.shape[:2]
    # All examples' frame 0 first, then all examples' frame 1, and so on.
    images_KSSC = np.concatenate(tracks.frames_BTSSC.swapaxes(0, 1))
    images_KCSS = normalise(images_KSSC, model.device)
    _, levels_NKC, positions_NKC, sizes = model._prepare_backbone_features(
        model.forward_image(images_KCSS)
    )
    masks_TB1SS = torch.from_numpy(tracks.masks_BTSS.swapaxes(0, 1).copy())[:, :, None]
    masks_TB1SS = masks_TB1SS.to(model.device)

    def frame(t: int) -> FrameStep:
        now = slice(t * size, (t + 1) * size)
        return FrameStep(
            levels_NBC=[level_NKC[:, now] for level_NKC in levels_NKC],
            positions_NBC=positions_NKC[-1][:, now],
            sizes=tuple(sizes),
            step=t,
            num_steps=NUM_FRAMES,
        )

    kind = PROMPT_KINDS[int(random.choice(len(PROMPT_KINDS), p=_PROMPT_SHARES))]
    points, mask_B1SS = None, None
    if kind == "mask":
        mask_B1SS = masks_TB1SS[0].float()
    else:
        points = _as_points(model, *points_of(random, tracks.masks_BTSS[:, 0], kind))

    bank = Sam2Model(model).new_bank()
    losses, ious = [_proposal_loss(model, frame(0), tracks.figures_BSS, random)], []
    for t in range(num_frames):
        prompted = t == 0
        frames = frame(t)
        heads, _ = track_step(
            model,
            frames,
            bank.outputs,
            points=points if prompted else None,
            mask_B1SS=mask_B1SS if prompted else None,
            prompted=prompted,
        )
        logits_BMHW, _, iou_BM, best_B1HW, high_B1SS, pointer_BC, score_B1 = heads
        if prompted:
            high_B1SS = enlarge_mask(model.image_size, best_B1HW)
        memory_BCHW, positions = model._encode_new_memory(
            current_vision_feats=frames.levels_NBC,
            feat_sizes=frames.sizes,
            pred_masks_high_res=high_B1SS,
            object_score_logits=score_B1,
            is_mask_from_pts=prompted,
        )
        bank.store(t, memory=memory_BCHW, positions=positions[-1], pointer_BC=pointer_BC)
        if not (prompted and kind == "mask"):  # then the mask is returned as it was given
            losses.append(_frame_loss(model, logits_BMHW, iou_BM, score_B1, masks_TB1SS[t]))
            ious.append(_mean_iou(high_B1SS, masks_TB1SS[t]))
    return torch.stack(losses).mean(), float(np.nanmean(ious))


def _as_points(model: Any, points_BP2: np.ndarray, labels_BP: np.ndarray) -> dict[str, Tensor]:
    return {
        "point_coords": torch.from_numpy(points_BP2).to(model.device),
        "point_labels": torch.from_numpy(labels_BP).to(model.device),
    }


def _proposal_loss(
    model: Any, frames: FrameStep, figures_BSS: np.ndarray, random: np.random.Generator
) -> Tensor:
    """Loss of the masks proposed for a point anywhere: on a figure that figure, elsewhere none.

    Where there is none, the predicted IoU is trained to be 0.
    """
    targets, points = [], []
    for figures_SS in figures_BSS:
        label = int(random.choice([0, 0, *np.unique(figures_SS[figures_SS > 0])]))
        y_N, x_N = np.nonzero(figures_SS == label)
        chosen = random.integers(len(y_N))
        points.append([[x_N[chosen] + 0.5, y_N[chosen] + 0.5]])
        targets.append((figures_SS == label) & (label > 0))
    labels_B1 = np.ones((len(points), 1), np.int32)
    heads, _ = track_step(
        model,
        frames,
        {},
        points=_as_points(model, np.array(points, np.float32), labels_B1),
        prompted=True,
    )
    logits_BMHW, _, iou_BM, _, _, _, score_B1 = heads
    target_B1SS = torch.from_numpy(np.stack(targets))[:, None].to(model.device)
    nothing_B = ~target_B1SS.flatten(1).any(1)
    loss = _frame_loss(model, logits_BMHW, iou_BM, score_B1, target_B1SS)
    return loss + (iou_BM.mean(1) * nothing_B).mean()


def _frame_loss(
    model: Any, logits_BMHW: Tensor, iou_BM: Tensor, score_B1: Tensor, target_B1SS: Tensor
) -> Tensor:
    # Where the object score is negative, SAM2 returns logits of -1024.
    logits_BMSS = enlarge_mask(model.image_size, logits_BMHW.clamp(-20, 20))
    target_BMSS = target_B1SS.float().expand_as(logits_BMSS)
    pixels_B1 = target_B1SS.flatten(2).sum(2)
    present_B1 = (pixels_B1 > 0).float()
    entropy_BM = F.binary_cross_entropy_with_logits(
        logits_BMSS, target_BMSS, reduction="none"
    ).mean((2, 3))
    found_BMSS = logits_BMSS.sigmoid()
    dice_BM = 1 - (2 * (found_BMSS * target_BMSS).sum((2, 3)) + 1) / (
        (found_BMSS + target_BMSS).sum((2, 3)) + 1
    )
    best_B = (_MASK_WEIGHT * entropy_BM + dice_BM).amin(1)
    with torch.no_grad():
        real_BM = _iou(logits_BMSS > 0, target_B1SS)
    error_B = (iou_BM - real_BM).abs().mean(1)
    masks = ((best_B + error_B) * present_B1[:, 0]).sum() / present_B1.sum().clamp(min=1)
    sure_B1 = ((pixels_B1 == 0) | (pixels_B1 >= _MIN_PIXELS)).float()
    score = F.binary_cross_entropy_with_logits(score_B1, present_B1, weight=sure_B1)
    return masks + score


def _iou(found_BMSS: Tensor, real_B1SS: Tensor) -> Tensor:
    shared_BM = (found_BMSS & real_B1SS).sum((2, 3))
    return shared_BM / (found_BMSS | real_B1SS).sum((2, 3)).clamp(min=1)


def _mean_iou(logits_B1SS: Tensor, target_B1SS: Tensor) -> float:
    """NaN if no subject is visible."""
    visible_B = target_B1SS.flatten(1).any(1)
    return _iou(logits_B1SS > 0, target_B1SS)[visible_B].mean().item()
