"""Choice of the subject among SAM2's mask proposals, as pure functions.

The rule, RULE_VERSION 1. Areas and lengths are fractions of the frame.

1. A proposal is kept if its predicted IoU is >= 0.7, it is stable (IoU of the masks at logits above
   +1 and above -1 >= 0.85), and it covers 0.5% to 60% of the frame. Of two with an IoU above 0.7,
   the one with the higher quality is kept.
2. quality = predicted IoU * stability * (1 - fraction of the frame's border that it covers), since
   masks along the border are usually background.
3. inside and around are the mean speeds, relative to the camera, of its tokens and of a ring around
   it, in tokens per frame on a grid of at most 64 tokens per side. Tokens are weighted by the
   certainty of their match, so that a textureless body has the speed of its outline.
   contrast = (inside - around) / (inside + around + 0.05), at least 0. It is low for a part of a
   moving body and for a mask that is too large, since their surroundings move too.
   share = fraction of all motion above the frame's median that is inside it; of two that move
   alike, it prefers the one with more of the motion.
   score = quality * contrast * sqrt(share).
4. A proposal moves if inside - around is at least 0.05 tokens per frame. The highest score among
   moving proposals wins.
5. If none moves: score = quality * sqrt(area / 60%) * exp(-d^2), where d is the distance of the
   mask's centre from the frame's, in half sides.

Ties go to the first proposal. The score, between 0 and 1, is the confidence of the choice.

Legend: N proposal, S side of a mask, H W token grid.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from stages.extract_features.prompts.camera_motion import OwnMotion, weighted_median

RULE_VERSION = 1
_MIN_PREDICTED_IOU = 0.7
_MIN_STABILITY = 0.85
_STABILITY_MARGIN = 1.0
_MIN_AREA = 0.005
_MAX_AREA = 0.6
_SAME_MASK = 0.7
_MIN_SPEED = 0.05
_RING = 1 / 16
"""Width of the ring around a mask, as a fraction of the grid's longer side."""
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Proposals that may be the subject, highest quality first, on the CPU."""

    logits_NSS: torch.Tensor
    predicted_iou_N: np.ndarray
    stability_N: np.ndarray
    area_N: np.ndarray
    quality_N: np.ndarray

    def __len__(self) -> int:
        return len(self.logits_NSS)

    def masks_on_grid(self, height: int, width: int) -> np.ndarray:
        """Return the fraction of every token that each mask covers: float64 [N, H, W]."""
        masks_N1SS = (self.logits_NSS > 0).double()[:, None]
        return F.adaptive_avg_pool2d(masks_N1SS, (height, width))[:, 0].numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The candidate that the rule chooses."""

    index: int
    score: float
    moves: bool
    speed: float
    """Inside minus around, in tokens per frame."""


def select_candidates(logits_NSS: torch.Tensor, predicted_iou_N: torch.Tensor) -> Candidates:
    """Apply steps 1 and 2 of the rule.

    Args:
        logits_NSS: Mask logits of the proposals.
        predicted_iou_N: IoU that SAM2 predicts for each.
    """
    area_N = (logits_NSS > 0).sum((1, 2)) / logits_NSS.shape[1:].numel()
    inner_N = (logits_NSS > _STABILITY_MARGIN).sum((1, 2))
    outer_N = (logits_NSS > -_STABILITY_MARGIN).sum((1, 2))
    stability_N = inner_N / outer_N.clamp(min=1)
    kept_N = (
        (predicted_iou_N >= _MIN_PREDICTED_IOU)
        & (stability_N >= _MIN_STABILITY)
        & (area_N >= _MIN_AREA)
        & (area_N <= _MAX_AREA)
    )
    logits_NSS = logits_NSS[kept_N]
    fit_N, stability_N = predicted_iou_N[kept_N].clamp(max=1), stability_N[kept_N]
    quality_N = fit_N * stability_N * (1 - _border_share(logits_NSS > 0))
    order_N = torch.argsort(quality_N, descending=True, stable=True)
    order_N = order_N[_distinct(logits_NSS[order_N] > 0)]
    return Candidates(
        logits_NSS=logits_NSS[order_N].float().cpu(),
        predicted_iou_N=_to_float64(fit_N[order_N]),
        stability_N=_to_float64(stability_N[order_N]),
        area_N=_to_float64(area_N[kept_N][order_N]),
        quality_N=_to_float64(quality_N[order_N]),
    )


def choose_subject(candidates: Candidates, motion: OwnMotion) -> Choice:
    """Apply steps 3 to 5 of the rule.

    Args:
        candidates: At least one candidate.
        motion: Motion of the tokens of the candidates' frame.
    """
    speed_HW, certainty_HW = motion.speed_HW, motion.certainty_HW
    masks_NHW = candidates.masks_on_grid(*speed_HW.shape)
    inside_N = _mean(speed_HW, masks_NHW * certainty_HW)
    around_N = _mean(speed_HW, _rings(masks_NHW) * certainty_HW)
    excess_N = inside_N - around_N
    moves_N = excess_N >= _MIN_SPEED
    if moves_N.any():
        contrast_N = np.maximum(excess_N, 0) / (inside_N + around_N + _MIN_SPEED)
        usual = weighted_median(speed_HW.ravel(), certainty_HW.ravel())
        above_HW = certainty_HW * np.maximum(speed_HW - usual, 0)
        share_N = (masks_NHW * above_HW).sum((1, 2)) / max(above_HW.sum(), _TINY)
        score_N = candidates.quality_N * contrast_N * np.sqrt(share_N)
        score_N = np.where(moves_N, score_N, 0)
    else:
        size_N = np.sqrt(candidates.area_N / _MAX_AREA)
        score_N = candidates.quality_N * size_N * _centrality(masks_NHW)
    index = int(np.argmax(score_N))
    return Choice(
        index=index,
        score=float(score_N[index]),
        moves=bool(moves_N[index]),
        speed=float(excess_N[index]),
    )


def _border_share(masks_NSS: torch.Tensor) -> torch.Tensor:
    border_SS = torch.ones(masks_NSS.shape[1:], dtype=torch.bool, device=masks_NSS.device)
    border_SS[1:-1, 1:-1] = False
    return masks_NSS[:, border_SS].float().mean(1)


def _distinct(masks_NSS: torch.Tensor) -> torch.Tensor:
    """Return the indices of masks that do not overlap an earlier kept one."""
    flat_ND = masks_NSS.flatten(1).float()
    shared_NN = flat_ND @ flat_ND.T
    areas_N = flat_ND.sum(1)
    overlap_NN = (shared_NN / (areas_N[:, None] + areas_N - shared_NN)).cpu()
    kept: list[int] = []
    for index in range(len(flat_ND)):
        if not (overlap_NN[index, kept] > _SAME_MASK).any():
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long, device=masks_NSS.device)


def _to_float64(values_N: torch.Tensor) -> np.ndarray:
    return values_N.double().cpu().numpy()


def _rings(masks_NHW: np.ndarray) -> np.ndarray:
    """Return a ring around each mask, excluding adjacent tokens, whose features cover both."""
    width = max(1, round(max(masks_NHW.shape[1:]) * _RING))
    touched_N1HW = torch.from_numpy(masks_NHW > 0).float()[:, None]
    near_N1HW, far_N1HW = (
        F.max_pool2d(touched_N1HW, 2 * reach + 1, stride=1, padding=reach)
        for reach in (1, 1 + width)
    )
    return (far_N1HW - near_N1HW)[:, 0].double().numpy()


def _mean(values_HW: np.ndarray, weights_NHW: np.ndarray) -> np.ndarray:
    """Return the mean under each map of weights; 0 if all weights are 0."""
    return (weights_NHW * values_HW).sum((1, 2)) / np.maximum(weights_NHW.sum((1, 2)), _TINY)


def _centrality(masks_NHW: np.ndarray) -> np.ndarray:
    _, height, width = masks_NHW.shape
    total_N = masks_NHW.sum((1, 2))
    y_N = (masks_NHW.sum(2) @ _places(height)) / total_N
    x_N = (masks_NHW.sum(1) @ _places(width)) / total_N
    return np.exp(-(np.square(x_N) + np.square(y_N)))


def _places(length: int) -> np.ndarray:
    """Return the centres of tokens, from -1 to 1."""
    return (2 * np.arange(length) + 1) / length - 1
