"""One tracking step of SAM2 over a batch of streams, and mask proposals on a single frame."""

# Legend: S side of SAM2's square input, N point or position on a level (row-major), B stream or
# point of the batch, M mask of a point, C channel, H W grid.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from stages.config import FeatureKind
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.memory import MemoryBank

_ON_SUBJECT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskProposals:
    """Three candidate masks per point (a part, the object, what it is on), in no fixed order.

    On the model's device, in float32.
    """

    logits: torch.Tensor
    """[N, 3, S/4, S/4]; positive on the mask."""
    predicted_iou: torch.Tensor
    """[N, 3]: IoU that SAM2 predicts for each mask."""


def propose_masks(
    model: Any,
    levels_NBC: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    points_N2: torch.Tensor,
    *,
    points_per_batch: int,
) -> MaskProposals:
    """Decode three masks for every point, like sam2's SAM2ImagePredictor.

    Unlike the tracker's masks, these do not depend on the object score.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameStep:
    """The frame that each stream visits at one step."""

    levels_NBC: list[torch.Tensor]
    """Image encoder levels, highest resolution first."""
    positions_NBC: torch.Tensor
    """Position encoding of the last level."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level."""
    step: int
    """Number of the visit; 0 is the prompted one."""
    num_steps: int
    """Number of visits; passed to SAM2 as the number of frames."""

    def stream(self, b: int) -> "FrameStep":
        """Return the part of one stream."""
        return FrameStep(
            levels_NBC=[level_NBC[:, b : b + 1] for level_NBC in self.levels_NBC],
            positions_NBC=self.positions_NBC[:, :1],
            sizes=self.sizes,
            step=self.step,
            num_steps=self.num_steps,
        )

    def track(
        self,
        model: Any,
        outputs: dict[str, Any],
        *,
        points: dict[str, Any] | None = None,
        mask_B1SS: torch.Tensor | None = None,
        prompted: bool = False,
    ) -> tuple[Any, torch.Tensor]:
        """Run SAM2Base._track_step; return the mask heads' outputs and the features they got."""
        _, heads, _, features_BCHW = model._track_step(
            frame_idx=self.step,
            is_init_cond_frame=prompted,
            current_vision_feats=self.levels_NBC,
            current_vision_pos_embeds=[self.positions_NBC],
            feat_sizes=self.sizes,
            point_inputs=points,
            mask_inputs=mask_B1SS,
            output_dict=outputs,
            num_frames=self.num_steps,
            track_in_reverse=False,
            prev_sam_mask_logits=None,
        )
        return heads, features_BCHW


def prompted_masks(
    model: Any, frames: FrameStep, prompt: Sam2Prompt
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode a prompt's mask on the single frame of `frames`, without storing a memory.

    Returns:
        Mask logits [1, 1, S/4, S/4], object pointer [1, C], score [1, 1].
    """
    points = None
    if prompt.points_1P2 is not None:
        points = {"point_coords": prompt.points_1P2, "point_labels": prompt.point_labels_1P}
    heads, _ = frames.track(model, {}, points=points, mask_B1SS=prompt.mask_11SS, prompted=True)
    _, _, _, logits_11HW, _, pointer_1C, score_11 = heads
    return logits_11HW, pointer_1C, score_11


def visit(
    model: Any,
    frames: FrameStep,
    bank: MemoryBank,
    prompts: list[Sam2Prompt],
    memory_dtype: torch.dtype,
    features: Sequence[FeatureKind],
) -> tuple[torch.Tensor, torch.Tensor, dict[FeatureKind, torch.Tensor]]:
    """Track one frame of every stream and store its memory in the bank.

    Args:
        model: A SAM2Base.
        frames: One frame per stream.
        bank: The streams' memories.
        prompts: One per stream; used at step 0 only.
        memory_dtype: Storage dtype of memories.
        features: Features to return; others are not computed unless SAM2 itself needs them.

    Returns:
        Mask logits [B, 1, S/4, S/4]; object scores [B, 1], logits of the subject being visible;
        features [B, C, S/16, S/16] by kind.
    """
    attended_BCHW = None
    if frames.step == 0:
        # One at a time, since prompts have different numbers of points.
        streams = [prompted_masks(model, frames.stream(b), p) for b, p in enumerate(prompts)]
        logits_B1HW, pointer_BC, score_B1 = (torch.cat(part) for part in zip(*streams, strict=True))
        # As in SAM2VideoPredictor.propagate_in_video_preflight, the memory of a prompted frame is
        # computed from its low-resolution mask.
        mask_B1SS = enlarge_mask(model, logits_B1HW)
    else:
        heads, attended_BCHW = frames.track(model, bank.outputs)
        _, _, _, logits_B1HW, mask_B1SS, pointer_BC, score_B1 = heads
    memory_BCHW, positions = model._encode_new_memory(
        current_vision_feats=frames.levels_NBC,
        feat_sizes=frames.sizes,
        pred_masks_high_res=mask_B1SS,
        object_score_logits=score_B1,
        is_mask_from_pts=frames.step == 0,
    )
    bank.store(
        frames.step,
        memory_BCHW=memory_BCHW.to(memory_dtype),
        positions_BCHW=positions[-1],
        pointer_BC=pointer_BC,
    )
    found: dict[FeatureKind, torch.Tensor] = {}
    if "memory_attention" in features:
        if attended_BCHW is None:
            attended_BCHW = _attend(model, frames, bank)
        found["memory_attention"] = attended_BCHW
    if "memory_encoder" in features:
        found["memory_encoder"] = memory_BCHW
    if "image_encoder" in features:
        last_BCN = frames.levels_NBC[-1].permute(1, 2, 0)
        found["image_encoder"] = last_BCN.unflatten(2, frames.sizes[-1])
    return logits_B1HW, score_B1, found


def _attend(model: Any, frames: FrameStep, bank: MemoryBank) -> torch.Tensor:
    """Apply memory attention of prompted frames to their own memories: [B, C, S/16, S/16].

    SAM2 skips memory attention on prompted frames, which would give features with different
    statistics from those of every later frame.
    """
    return model._prepare_memory_conditioned_features(
        frame_idx=frames.step,
        is_init_cond_frame=False,
        current_vision_feats=frames.levels_NBC[-1:],
        current_vision_pos_embeds=[frames.positions_NBC],
        feat_sizes=frames.sizes[-1:],
        output_dict=bank.outputs,
        num_frames=frames.num_steps,
    )


def enlarge_mask(model: Any, logits_B1HW: torch.Tensor) -> torch.Tensor:
    """Upsample mask logits like SAM2: [B, 1, S/4, S/4] -> [B, 1, S, S]."""
    side = model.image_size
    return F.interpolate(
        logits_B1HW.float(), size=(side, side), mode="bilinear", align_corners=False
    )
