"""Motion of tokens relative to the camera.

1. Tokens of frame 0 are matched with those of a few later frames by the highest similarity of their
   Local Gram Flow, refined to sub-token precision.
2. An affine motion (pan, zoom, roll, approximate perspective) is fitted to all matches robustly. It
   is the background's motion, as long as the background is the larger part.
3. Tokens are matched again with a penalty of `PRIOR` similarity per token of distance from the
   camera motion. Only differences that the penalty does not outweigh count as own motion, so that
   textureless surfaces, which match anywhere, are still.

Legend: F frame compared with frame 0, H W token grid, C channel, K neighbour, N token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stages.local_gram_flow import local_gram_flow, neighbour_mask, neighbour_offsets

RADIUS = 6
"""Search radius in tokens."""
PRIOR = 0.05
"""Similarity penalty per token of distance from the camera's motion."""
_TEMPERATURE = 0.02
"""Temperature of the softmax that refines matches and measures their certainty."""
_ITERATIONS = 50
_SMALLEST_SCALE = 0.05
"""Lower limit of the scale in tokens: the precision of matches; an exact fit has a scale of 0."""
_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnMotion:
    """Motion of frame 0's tokens relative to the camera."""

    speed_HW: np.ndarray
    """float64, tokens per frame: total distance over all pairs of frames / total time, since the
    precision of a match does not depend much on the number of frames between."""
    certainty_HW: np.ndarray
    """float64, 0..1: small if a token is similar to its surroundings, so that its motion is
    uncertain; 0 if the camera moves it out of the frame."""


def own_motion(
    features_HWC: torch.Tensor, later_FHWC: torch.Tensor, gaps: Sequence[int]
) -> OwnMotion:
    """Match frame 0 with later frames and subtract the camera's motion.

    Args:
        features_HWC: Features of frame 0.
        later_FHWC: Features of the frames to compare it with.
        gaps: Distance of each of them from frame 0, ascending. Frames for which the camera's
            motion so far would exceed the window are not used.
    """
    similarities_FHWK = _similarities(features_HWC, later_FHWC)
    height, width = similarities_FHWK.shape[1:3]
    tokens_HW2 = _tokens(height, width)
    distance_HW, time_HW = np.zeros((height, width)), np.zeros((height, width))
    total_time = 0
    camera_speed = 0.0
    for similarities_HWK, gap in zip(similarities_FHWK, gaps, strict=True):
        if camera_speed * gap > RADIUS - 1:
            break
        flow_HW2, certainty_HW = _matches(similarities_HWK)
        camera_HW2 = fit_affine(tokens_HW2, flow_HW2, certainty_HW)
        camera_speed = float(np.abs(camera_HW2).max()) / gap
        flow_HW2, _ = _matches(similarities_HWK - PRIOR * _distances(camera_HW2, similarities_HWK))
        weight_HW = certainty_HW * _is_inside(tokens_HW2 + camera_HW2)
        distance_HW += weight_HW * np.linalg.norm(flow_HW2 - camera_HW2, axis=-1)
        time_HW += weight_HW * gap
        total_time += gap
    speed_HW = np.divide(distance_HW, time_HW, out=np.zeros_like(time_HW), where=time_HW > 0)
    return OwnMotion(speed_HW=speed_HW, certainty_HW=time_HW / total_time)


def _similarities(features_HWC: torch.Tensor, later_FHWC: torch.Tensor) -> torch.Tensor:
    """Return similarities_FHWK of frame 0's tokens with each later frame; -inf outside the grid."""
    first_FHWC = features_HWC.float().expand_as(later_FHWC)
    pairs_F2HWC = torch.stack([first_FHWC, later_FHWC.float()], dim=1)
    # The common mean would make all tokens similar.
    pairs_F2HWC = pairs_F2HWC - pairs_F2HWC.mean(dim=(0, 1, 2, 3))
    similarities_FHWK = local_gram_flow(pairs_F2HWC, RADIUS)[:, 0]
    _, height, width, _ = similarities_FHWK.shape
    inside_HWK = neighbour_mask(height, width, RADIUS, similarities_FHWK.device)
    return similarities_FHWK.masked_fill(~inside_HWK, -torch.inf).cpu()


def _matches(similarities_HWK: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Match each token: flow_HW2, (dx, dy) in tokens, and certainty_HW.

    The best neighbour, refined by the softmax over it and adjacent ones. The certainty is
    1 / (1 + v), where v is the variance of the softmax over the whole window in tokens squared.
    """
    offsets_K2 = neighbour_offsets(RADIUS).double()
    logits_HWK = similarities_HWK.double() / _TEMPERATURE
    probability_HWK = logits_HWK.softmax(-1)
    mean_HW2 = probability_HWK @ offsets_K2
    variance_HW = probability_HWK @ offsets_K2.square().sum(-1) - mean_HW2.square().sum(-1)
    best_HW2 = offsets_K2[similarities_HWK.argmax(-1)]
    adjacent_HWK = (offsets_K2 - best_HW2[..., None, :]).abs().amax(-1) <= 1
    near_HWK = logits_HWK.masked_fill(~adjacent_HWK, -torch.inf).softmax(-1)
    return (near_HWK @ offsets_K2).numpy(), (1 / (1 + variance_HW.clamp(min=0))).numpy()


def _distances(camera_HW2: np.ndarray, similarities_HWK: torch.Tensor) -> torch.Tensor:
    """Return each neighbour's distance from the token's camera motion: [H, W, K], in tokens."""
    offsets_K2 = neighbour_offsets(RADIUS).double()
    return torch.linalg.vector_norm(
        offsets_K2 - torch.from_numpy(camera_HW2)[:, :, None], dim=-1
    ).to(similarities_HWK.dtype)


def fit_affine(tokens_HW2: np.ndarray, flow_HW2: np.ndarray, weights_HW: np.ndarray) -> np.ndarray:
    """Fit the affine motion of the majority of tokens: camera_HW2, in tokens.

    Iteratively reweighted least squares with Geman-McClure weights, 1 / (1 + (r / s)^2)^2, where
    the scale s is the weighted median of the distances r, so that up to half of the tokens may be
    outliers.

    Args:
        tokens_HW2: x, y of the tokens.
        flow_HW2: dx, dy of each token.
        weights_HW: Weight of each token, >= 0.
    """
    tokens_N2, flow_N2 = tokens_HW2.reshape(-1, 2), flow_HW2.reshape(-1, 2)
    prior_N = weights_HW.reshape(-1)
    terms_N3 = np.concatenate([np.ones((len(tokens_N2), 1)), tokens_N2], axis=1)
    # Start from the median motion, since least squares would be biased by a large subject.
    camera_N2 = np.tile(
        [weighted_median(component_N, prior_N) for component_N in flow_N2.T], (len(flow_N2), 1)
    )
    for _ in range(_ITERATIONS):
        distance_N = np.linalg.norm(flow_N2 - camera_N2, axis=-1)
        scale = _MAD_TO_DEVIATION * weighted_median(distance_N, prior_N)
        robust_N = (1 + np.square(distance_N / max(scale, _SMALLEST_SCALE))) ** -2
        root_N1 = np.sqrt(prior_N * robust_N)[:, None]
        coefficients_32, *_ = np.linalg.lstsq(root_N1 * terms_N3, root_N1 * flow_N2, rcond=None)
        camera_N2 = terms_N3 @ coefficients_32
    return camera_N2.reshape(flow_HW2.shape)


def weighted_median(values_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Return the value below which half of the weight lies; 0 if the total weight is 0."""
    order_N = np.argsort(values_N, kind="stable")
    total_N = np.cumsum(weights_N[order_N])
    if total_N[-1] == 0:
        return 0.0
    return float(values_N[order_N[np.searchsorted(total_N, total_N[-1] / 2)]])


def _tokens(height: int, width: int) -> np.ndarray:
    """Return x, y of every token: [H, W, 2]."""
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float64)
    return np.stack([x_HW, y_HW], axis=-1)


def _is_inside(places_HW2: np.ndarray) -> np.ndarray:
    height, width, _ = places_HW2.shape
    limit = np.array([width - 1, height - 1])
    return np.asarray(((places_HW2 >= 0) & (places_HW2 <= limit)).all(axis=-1))
