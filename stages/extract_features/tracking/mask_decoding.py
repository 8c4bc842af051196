"""SAM2's mask decoder on one frame, without memory: proposals for automatic prompts; for
`two_way_tracking`.
"""

# Legend: S side of SAM2's square input, N point or position on a level, B point of a batch, M mask
# of a point, C channel, H W grid.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_ON_SUBJECT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskProposals:
    """What SAM2 takes each of N points for: a part, a whole, or what it is on, in no fixed order.

    On the model's device, in float32.
    """

    logits: torch.Tensor
    """[N, 3, S/4, S/4]; positive on the mask."""
    predicted_iou: torch.Tensor
    """[N, 3]: how well SAM2 expects each mask to fit."""


def propose_masks(
    model: Any,
    levels_NBC: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    points_N2: torch.Tensor,
    *,
    points_per_batch: int,
) -> MaskProposals:
    """Decode three masks for every point, as sam2's SAM2ImagePredictor does it.

    Unlike the tracker's, these masks do not depend on the score of the object being visible.

    Args:
        model: A SAM2Base.
        levels_NBC: The frame's levels, B = 1.
        sizes: Height and width of each level.
        points_N2: x, y in pixels of the square.
        points_per_batch: Points decoded at once.
    """
    maps_1CHW = [
        level_NBC.permute(1, 2, 0).reshape(1, -1, *size)
        for level_NBC, size in zip(levels_NBC, sizes, strict=True)
    ]
    frame_1CHW = model._prepare_memory_conditioned_features(
        frame_idx=0,
        is_init_cond_frame=True,
        current_vision_feats=levels_NBC[-1:],
        current_vision_pos_embeds=[],
        feat_sizes=sizes[-1:],
        output_dict={},
        num_frames=1,
    )
    decoded = [
        _decode(model, frame_1CHW, maps_1CHW[:-1], points_B2)
        for points_B2 in points_N2.to(model.device, torch.float32).split(points_per_batch)
    ]
    return MaskProposals(
        logits=torch.cat([logits_BMHW for logits_BMHW, _ in decoded]),
        predicted_iou=torch.cat([iou_BM for _, iou_BM in decoded]),
    )


def _decode(
    model: Any,
    frame_1CHW: torch.Tensor,
    finer_1CHW: list[torch.Tensor],
    points_B2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    labels_B1 = torch.full((len(points_B2), 1), _ON_SUBJECT, dtype=torch.int32).to(model.device)
    sparse, dense = model.sam_prompt_encoder(
        points=(points_B2[:, None], labels_B1), boxes=None, masks=None
    )
    logits_BMHW, iou_BM, _, _ = model.sam_mask_decoder(
        image_embeddings=frame_1CHW,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=True,
        high_res_features=finer_1CHW or None,
    )
    return logits_BMHW.float(), iou_BM.float()
