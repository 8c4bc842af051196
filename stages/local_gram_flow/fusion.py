"""Fusion of forward and backward tracks, of one or several subjects, into one map per frame.

Also resampling of fused maps to another token grid.

Legend: T frame, H W token grid, C channel, G fused channel, P part of the fused channels, D channel
of a part (G = P * D), S subject.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.local_gram_flow.alignment import resample_to_grid

Fusion = Literal["gram_flow", "average", "forward"]

Directions = Literal["fused", "forward", "backward", "averaged"]
"""Tracking directions to extract from tokens fused in Gram-flow space; see `take_directions`."""


def fuse_directions(
    forward_THWC: Tensor, backward_THWC: Tensor | None, *, fusion: Fusion, forward_weight: float
) -> Tensor:
    """Fuse both tracking directions into unit-norm tokens.

    `gram_flow`: with unit tokens f and b and weight a, g = concat(sqrt(a) f, sqrt(1-a) b) gives
    <g_p, g_q> = a <f_p, f_q> + (1-a) <b_p, b_q> for every pair of tokens: exact fusion in
    Gram-flow space, in one stored array. `average`: a f + (1-a) b, renormalised; its products
    include the cross terms <f, b>, which fusion in Gram-flow space does not (ablation). `forward`:
    f only (ablation).

    Args:
        forward_THWC: features of the forward track; need not be normalised.
        backward_THWC: features of the backward track for the same frames in the same order; None
            with `forward`.
        fusion: fusion method.
        forward_weight: weight a of the forward direction, 0 to 1.

    Returns:
        fused_THWG, unit norm, float32 (float64 for float64 input); G is 2C for `gram_flow`, else C.

    Raises:
        ValueError: shapes differ, the backward track is missing, or the weight is outside 0 to 1.
    """
    if fusion == "forward":
        return _unit_tokens(forward_THWC)
    if backward_THWC is None or backward_THWC.shape != forward_THWC.shape:
        found = None if backward_THWC is None else tuple(backward_THWC.shape)
        raise ValueError(
            f"fusion '{fusion}' needs a backward track of the forward track's shape "
            f"{tuple(forward_THWC.shape)}, got {found}"
        )
    if not 0.0 <= forward_weight <= 1.0:
        raise ValueError(
            f"forward_weight must be in 0..1, got {forward_weight}; 0.5 weights both equally"
        )
    forward_THWC, backward_THWC = _unit_tokens(forward_THWC), _unit_tokens(backward_THWC)
    if fusion == "average":
        return _unit_tokens(forward_weight * forward_THWC + (1 - forward_weight) * backward_THWC)
    return torch.cat(
        [forward_weight**0.5 * forward_THWC, (1 - forward_weight) ** 0.5 * backward_THWC], dim=-1
    )


def fuse_subjects(fused_THWG: Sequence[Tensor], *, num_slots: int) -> Tensor:
    """Combine several subjects' fused tokens into one map, averaged in Gram-flow space.

    With N subjects, g = concat(g_1, ..., g_N, 0, ...) / sqrt(N) makes <g_p, g_q> exactly the mean
    over the subjects of <g_n,p, g_n,q> for every pair of tokens; empty slots contribute 0.

    Args:
        fused_THWG: output of `fuse_directions` for each subject; all of the same shape.
        num_slots: number of subject slots in the result, at least the number of subjects.

    Returns:
        fused_THWG with `num_slots` times the channels; unit norm where the subjects have it.

    Raises:
        ValueError: no subject, or more subjects than slots.
    """
    if not 1 <= len(fused_THWG) <= num_slots:
        raise ValueError(
            f"{len(fused_THWG)} subjects do not fit into {num_slots} slots; give 1 to {num_slots}"
        )
    scale = len(fused_THWG) ** -0.5
    empty = [torch.zeros_like(fused_THWG[0])] * (num_slots - len(fused_THWG))
    return torch.cat([*(scale * subject for subject in fused_THWG), *empty], dim=-1)


def take_directions(
    fused_THWG: Tensor, parts: int, directions: Directions, *, forward_weight: float
) -> Tensor:
    """Recover one track, or the average of both, from tokens fused with `gram_flow`.

    The parts are each subject's forward and backward tokens, sqrt(a) f and sqrt(1-a) b;
    renormalising recovers f and b. `forward` is f, `backward` b, `averaged` a f + (1-a) b,
    renormalised per subject, equal to the fusions `forward` and `average`. Empty subject slots and
    frames that were not tracked stay zero.

    Args:
        fused_THWG: output of `fuse_directions` with `gram_flow`, then of `fuse_subjects` if there
            are several subjects; any leading axes.
        parts: P, two per subject slot.
        directions: directions to return; `fused` returns the input unchanged.
        forward_weight: weight a of the forward direction.

    Returns:
        Unit tokens of half the channels and P / 2 parts, float32 (float64 for float64 input).

    Raises:
        ValueError: P is odd, or the requested direction was fused with weight 0.
    """
    if directions == "fused":
        return fused_THWG
    if parts % 2:
        raise ValueError(
            f"tokens of {parts} parts are not pairs of a forward and a backward direction fused "
            "in Gram-flow space; extract the teacher with extract.teacher.fusion=gram_flow"
        )
    if {"forward": forward_weight, "backward": 1.0 - forward_weight}.get(directions) == 0.0:
        raise ValueError(
            f"tokens fused with forward_weight {forward_weight:g} do not contain the {directions} "
            "direction; extract the teacher with extract.teacher.forward_weight=0.5"
        )
    parts_THWPD = F.normalize(_in_parts(fused_THWG, parts), dim=-1)
    forward_THWSD, backward_THWSD = parts_THWPD[..., 0::2, :], parts_THWPD[..., 1::2, :]
    taken_THWSD = backward_THWSD if directions == "backward" else forward_THWSD
    if directions == "averaged":
        taken_THWSD = forward_weight * forward_THWSD + (1 - forward_weight) * backward_THWSD
    return F.normalize(F.normalize(taken_THWSD, dim=-1).flatten(-2), dim=-1)


def regrid_fused(
    fused_THWG: Tensor, height: int, width: int, parts: int, *, norm_P: Tensor | None = None
) -> Tensor:
    """Resample one clip's fused tokens to another grid, keeping the norm of each part.

    The channels are `parts` groups of equal width, one per direction and subject. The norm of a
    group is the same at every token of a clip and is its weight in the fused similarity.
    Interpolation between neighbours shortens tokens, so each part is rescaled to its norm. Zeros
    (frames that were not tracked, empty subject slots) stay zero.

    Args:
        fused_THWG: all or some maps of one clip; any floating dtype.
        height: rows of the new grid.
        width: columns of the new grid.
        parts: P, the store's setting `parts`.
        norm_P: result of `part_norms` for the clip; None computes it from these maps.

    Returns:
        fused_THWG on the new grid, float32 (float64 for float64 input).

    Raises:
        ValueError: the channels do not split into `parts` equal groups.
    """
    if norm_P is None:
        norm_P = part_norms([fused_THWG], parts)
    parts_THWPD = _in_parts(fused_THWG, parts)
    G = fused_THWG.shape[-1]
    resampled_THWG = resample_to_grid(parts_THWPD.flatten(-2).permute(0, 3, 1, 2), height, width)
    resampled_THWPD = resampled_THWG.unflatten(-1, (parts, G // parts))
    return (F.normalize(resampled_THWPD, dim=-1) * norm_P[:, None]).flatten(-2)


def part_norms(pieces_THWG: Iterable[Tensor], parts: int) -> Tensor:
    """Norm of each part of one clip's fused tokens: norm_P.

    The mean over the non-zero tokens, which averages out float16 rounding.

    Args:
        pieces_THWG: the clip's maps, in one or several chunks.
        parts: P, the store's setting `parts`.

    Raises:
        ValueError: the channels do not split into `parts` equal groups.
    """
    norms = [_in_parts(piece_THWG, parts).norm(dim=-1) for piece_THWG in pieces_THWG]
    total_P = sum(norm_THWP.sum(dim=(0, 1, 2)) for norm_THWP in norms)
    occupied_P = sum((norm_THWP > 0).sum(dim=(0, 1, 2)) for norm_THWP in norms)
    assert isinstance(total_P, Tensor) and isinstance(occupied_P, Tensor), "no maps given"
    return total_P / occupied_P.clamp(min=1)


def _in_parts(fused_THWG: Tensor, parts: int) -> Tensor:
    G = fused_THWG.shape[-1]
    if parts < 1 or G % parts:
        raise ValueError(
            f"{G} fused channels do not split into {parts} equal parts; see the setting `parts` "
            "of the teacher store"
        )
    dtype = torch.promote_types(fused_THWG.dtype, torch.float32)
    return fused_THWG.to(dtype).unflatten(-1, (parts, G // parts))


def _unit_tokens(features_THWC: Tensor) -> Tensor:
    dtype = torch.promote_types(features_THWC.dtype, torch.float32)
    return F.normalize(features_THWC.to(dtype), dim=-1)
