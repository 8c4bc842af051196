"""One tracking step over a batch of streams, and mask proposals on a single frame."""

# Legend: S side of the square input, N point, B stream of the batch, C channel, H W grid.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from stages.config import FeatureKind
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.memory import MemoryBank
from stages.sam2_tracking.model import DecodedMasks, FrameStep, TrackerModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskProposals:
    """Three candidate masks per point (a part, the object, what it is on), in no fixed order.

    On the model's device, in float32.
    """

    logits: torch.Tensor
    """[N, 3, H, W], four times the tokens' grid; positive on the mask."""
    predicted_iou: torch.Tensor
    """[N, 3]: IoU that the tracker predicts for each mask."""


def propose_masks(
    model: TrackerModel, frames: FrameStep, points_N2: torch.Tensor, *, points_per_batch: int
) -> MaskProposals:
    """Decode three masks for every point.

    Unlike the tracker's masks, these do not depend on the object score.

    Args:
        model: The network.
        frames: One frame.
        points_N2: x, y in pixels of the square.
        points_per_batch: Points decoded at once.
    """
    device = frames.positions_NBC.device
    decoded = [
        model.propose_masks(frames, points_B2)
        for points_B2 in points_N2.to(device, torch.float32).split(points_per_batch)
    ]
    return MaskProposals(
        logits=torch.cat([logits_BMHW.float() for logits_BMHW, _ in decoded]),
        predicted_iou=torch.cat([iou_BM.float() for _, iou_BM in decoded]),
    )


def visit(
    model: TrackerModel,
    frames: FrameStep,
    bank: MemoryBank,
    prompts: Sequence[Sam2Prompt],
    *,
    image_size: int,
    memory_dtype: torch.dtype,
    features: Sequence[FeatureKind],
) -> tuple[DecodedMasks, dict[FeatureKind, torch.Tensor]]:
    """Track one frame of every stream and store its memory in the bank.

    Args:
        model: The network.
        frames: One frame per stream.
        bank: The streams' memories.
        prompts: One per stream; used at step 0 only.
        image_size: S.
        memory_dtype: Storage dtype of memories, where the library does not fix one.
        features: Features to return; others are not computed unless the network needs them.

    Returns:
        The masks, and features [B, C, H, W] by kind.
    """
    attended_BCHW = None
    if frames.step == 0:
        # One at a time, since prompts have different numbers of points.
        streams = [model.decode_prompt(frames.stream(b), p) for b, p in enumerate(prompts)]
        masks = DecodedMasks(
            logits_B1HW=torch.cat([one.logits_B1HW for one in streams]),
            pointer_BC=torch.cat([one.pointer_BC for one in streams]),
            score_B1=torch.cat([one.score_B1 for one in streams]),
        )
        # As in sam2's SAM2VideoPredictor.propagate_in_video_preflight, the memory of a prompted
        # frame is computed from its low-resolution mask.
        mask_B1SS = enlarge_mask(image_size, masks.logits_B1HW)
    else:
        masks, mask_B1SS, attended_BCHW = model.track(frames, bank)
    memory = model.encode_memory(frames, mask_B1SS, masks.score_B1, dtype=memory_dtype)
    bank.store(
        frames.step,
        memory=memory.stored,
        positions=memory.positions,
        pointer_BC=masks.pointer_BC,
    )
    found: dict[FeatureKind, torch.Tensor] = {}
    if "memory_attention" in features:
        # Networks skip memory attention on prompted frames, which would give features with
        # different statistics from those of every later frame.
        found["memory_attention"] = (
            model.attend(frames, bank) if attended_BCHW is None else attended_BCHW
        )
    if "memory_encoder" in features:
        found["memory_encoder"] = memory.features_BCHW
    if "image_encoder" in features:
        found["image_encoder"] = frames.maps()[-1]
    return masks, found


def enlarge_mask(image_size: int, logits_B1HW: torch.Tensor) -> torch.Tensor:
    """Upsample mask logits to the square input like SAM2: [B, 1, S, S]."""
    return F.interpolate(
        logits_B1HW.float(), size=(image_size, image_size), mode="bilinear", align_corners=False
    )
