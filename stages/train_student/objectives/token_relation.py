"""Token-relation distillation: similarities of all token pairs of a clip, within and across frames.

Legend: B clip, L latent frame or tubelet, T map of the teacher, H W token grid, C channel, N pooled
token of a map.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.local_gram_flow import latent_frame_of_frame
from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.config import TokenRelationConfig
from stages.train_student.objectives.objective import Objective, only_valid


def token_relation_loss(
    student_BLHWC: Tensor, teacher_BLHWC: Tensor, valid_BL: Tensor, *, margin: float, pool: int
) -> Tensor:
    """Mean of max(0, |S_student - S_teacher| - margin) over all pairs of valid maps' tokens.

    S are cosine similarities of average-pooled tokens. Of the full matrix, all tokens of a clip
    times all tokens, only one map's rows exist at a time; they are recomputed in the backward pass.

    Args:
        student_BLHWC: any floating dtype, with gradient.
        teacher_BLHWC: the same maps and tokens, of any width; treated as constant.
        valid_BL: bool, valid maps; a pair is valid if both its maps are.
        margin: differences up to this are ignored.
        pool: side of the pooling squares; partial at the lower and right edge.

    Returns:
        loss_B, 0 for a clip without a valid map.

    Raises:
        ValueError: the maps or tokens of the two differ.

    Source: VideoREPA, arXiv 2505.23656; aHapBean/VideoREPA@8002687,
    finetune/models/cogvideox_t2v_align/lora_trainer.py, `token_relation_distillation`.
    """
    if student_BLHWC.shape[:-1] != teacher_BLHWC.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same tokens [clip, map, height, width], got "
            f"{tuple(student_BLHWC.shape[:-1])} and {tuple(teacher_BLHWC.shape[:-1])}"
        )
    student_BLNC = _pooled(only_valid(student_BLHWC, valid_BL), pool)
    with torch.no_grad():
        teacher_BLNC = _pooled(only_valid(teacher_BLHWC, valid_BL), pool)
    total_B = student_BLNC.new_zeros(len(student_BLNC))
    for row in range(student_BLNC.shape[1]):
        sums_BL = checkpoint(
            _excess_of_map,
            row,
            student_BLNC,
            teacher_BLNC,
            margin,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random; reading a GPU's RNG state syncs
        )
        counts_BL = valid_BL & valid_BL[:, row : row + 1]
        total_B = total_B + (sums_BL * counts_BL).sum(1)
    tokens_B = valid_BL.sum(1) * student_BLNC.shape[2]
    return total_B / tokens_B.clamp(min=1).to(total_B).square()


def _excess_of_map(row: int, student_BLNC: Tensor, teacher_BLNC: Tensor, margin: float) -> Tensor:
    """Loss of one map's tokens against each map's tokens, summed over tokens: sums_BL."""
    relations = [
        torch.einsum("bnc,blmc->blnm", tokens_BLNC[:, row], tokens_BLNC)
        for tokens_BLNC in (student_BLNC, teacher_BLNC)
    ]
    return F.relu((relations[0] - relations[1]).abs() - margin).sum((2, 3))


def _pooled(tokens_BLHWC: Tensor, pool: int) -> Tensor:
    """Average-pooled unit tokens: tokens_BLNC, in float32 (float64 for float64 input)."""
    return F.normalize(_averaged(tokens_BLHWC, pool).flatten(2, 3), dim=-1)


def _averaged(tokens_BLHWC: Tensor, pool: int) -> Tensor:
    """Means over squares, [B, L, ceil(H / pool), ceil(W / pool), C], in at least float32."""
    dtype = torch.promote_types(tokens_BLHWC.dtype, torch.float32)
    maps_NCHW = tokens_BLHWC.to(dtype).flatten(0, 1).permute(0, 3, 1, 2)
    pooled_NCHW = F.avg_pool2d(maps_NCHW, pool, ceil_mode=True, count_include_pad=False)
    return pooled_NCHW.permute(0, 2, 3, 1).unflatten(0, tokens_BLHWC.shape[:2])


class TokenRelation(Objective[TokenRelationConfig]):
    """`token_relation_loss` against the teacher's features, at most one map per latent frame of
    SAM2's or an image encoder's, every tubelet of a video encoder's."""

    def num_maps(self, teacher_maps: int | None, num_frames: int) -> int:
        """Frames are averaged to latent frames, since the cost is quadratic in the maps."""
        assert teacher_maps is not None, "token relations read a teacher"
        if teacher_maps != num_frames:
            return teacher_maps
        return int(latent_frame_of_frame(num_frames)[-1]) + 1

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B; a teacher with one map per frame is averaged over each latent frame.

        Args:
            student_BTHWC: the maps of `num_maps`; with a learned downsampler, already with one
                token per square.
            teacher: with features; those of an encoder on its own grid are resampled to the
                squares, or taken as they are if there is one token for each.
        """
        settings, pool = self.settings, self.settings.pool
        if teacher.layout.visual and teacher.layout.native:
            teacher = replace(teacher, token_grid=_pooled_grid(teacher.token_grid, pool))
            if settings.downsampler == "mean":
                student_BTHWC = _averaged(student_BTHWC, pool)
            teacher_BLHWC, valid_BL = teacher.features_at_latent_rate()
            pool = 1
        else:
            teacher_BLHWC, valid_BL = teacher.features_at_latent_rate()
            if settings.downsampler == "learned":
                teacher_BLHWC, pool = _averaged(teacher_BLHWC, pool), 1
        of_tubelets = teacher.layout.frames_per_map is not None
        first = 1 if settings.skip_first_latent and not of_tubelets else 0
        return token_relation_loss(
            student_BTHWC[:, first:],
            teacher_BLHWC[:, first:],
            valid_BL[:, first:],
            margin=settings.margin,
            pool=pool,
        )


def _pooled_grid(grid: tuple[int, int], pool: int) -> tuple[int, int]:
    """Rows and columns of the squares."""
    return -(-grid[0] // pool), -(-grid[1] // pool)
