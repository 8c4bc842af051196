"""Forward and backward tracks become one feature map per frame.

Legend: T frame, H W token grid, C channel, G fused channel.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Fusion = Literal["gram_flow", "average", "forward"]


def fuse_directions(
    forward_THWC: Tensor, backward_THWC: Tensor | None, *, fusion: Fusion, forward_weight: float
) -> Tensor:
    """Unit-norm fused tokens of both tracking directions.

    `gram_flow`: with unit tokens f and b and share a, g = concat(sqrt(a) f, sqrt(1-a) b) has
    <g_p, g_q> = a <f_p, f_q> + (1-a) <b_p, b_q> for every pair of tokens: fusion in Gram-flow
    space, exactly, in one stored array. `average`: a f + (1-a) b, renormalised; its products hold
    the cross terms <f, b> that the paper found harmful (ablation). `forward`: f alone (ablation).

    Args:
        forward_THWC: features of the forward track; need not be normalised.
        backward_THWC: features of the backward track for the same frames in the same order; None
            with `forward`.
        fusion: how the two become one.
        forward_weight: share a of the forward direction, 0 to 1.

    Returns:
        fused_THWG, float32 (float64 if given it), unit norm; G is 2C for `gram_flow`, else C.

    Raises:
        ValueError: shapes differ, the backward track is missing, or the share is outside 0 to 1.
    """
    if fusion == "forward":
        return _unit_tokens(forward_THWC)
    if backward_THWC is None or backward_THWC.shape != forward_THWC.shape:
        found = None if backward_THWC is None else tuple(backward_THWC.shape)
        raise ValueError(
            f"fusion '{fusion}' needs a backward track shaped as the forward one "
            f"{tuple(forward_THWC.shape)}, got {found}"
        )
    if not 0.0 <= forward_weight <= 1.0:
        raise ValueError(f"forward_weight must be in 0..1, got {forward_weight}; 0.5 is usual")
    forward_THWC, backward_THWC = _unit_tokens(forward_THWC), _unit_tokens(backward_THWC)
    if fusion == "average":
        return _unit_tokens(forward_weight * forward_THWC + (1 - forward_weight) * backward_THWC)
    return torch.cat(
        [forward_weight**0.5 * forward_THWC, (1 - forward_weight) ** 0.5 * backward_THWC], dim=-1
    )


def _unit_tokens(features_THWC: Tensor) -> Tensor:
    dtype = torch.promote_types(features_THWC.dtype, torch.float32)
    return F.normalize(features_THWC.to(dtype), dim=-1)
