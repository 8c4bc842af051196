"""SAM2 as built by the sam2 package: calls of SAM2Base's single-frame methods."""

# Legend: S side of SAM2's square input, N position on a level (row-major), B frame, stream or point
# of the batch, M mask of a point, C channel, H W grid.

from typing import Any

import torch

from stages.sam2_tracking.inputs import IMAGENET_MEAN, IMAGENET_STD, Sam2Prompt
from stages.sam2_tracking.memory import MemoryBank
from stages.sam2_tracking.model import DecodedMasks, EncodedImages, FrameStep, NewMemory

_ON_SUBJECT = 1


class Sam2Model:
    """A SAM2Base as a `TrackerModel`; results equal those of its SAM2VideoPredictor.

    Args:
        network: From `build.build_sam2`.
    """

    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD

    def __init__(self, network: Any) -> None:
        self._network = network
        # It would make the masks of a batch exclusive, as if they were objects of one video. The
        # stock predictor runs each object separately, so it has no effect there either.
        network.non_overlap_masks_for_mem_enc = False

    @property
    def image_encoder(self) -> torch.nn.Module:
        """Hiera and its neck."""
        return self._network.image_encoder

    def new_bank(self) -> MemoryBank:
        """Return an empty bank."""
        # With a stride r, memories are at multiples of r, so the oldest can be r - 1 steps further.
        network = self._network
        stride = network.memory_temporal_stride_for_eval
        return MemoryBank(
            memory_reach=max(1, 1 + (network.num_maskmem - 2) * stride),
            pointer_reach=network.max_obj_ptrs_in_encoder - 1,
        )

    def encode_images(self, images_B3SS: torch.Tensor) -> EncodedImages:
        """Run SAM2Base.forward_image."""
        outputs = self._network.forward_image(images_B3SS)
        _, levels_NBC, positions_NBC, sizes = self._network._prepare_backbone_features(outputs)
        return EncodedImages(levels_NBC=levels_NBC, positions_NBC=positions_NBC[-1], sizes=sizes)

    def decode_prompt(self, frames: FrameStep, prompt: Sam2Prompt) -> DecodedMasks:
        """Run SAM2Base._track_step on a prompted frame."""
        points = None
        if prompt.points_1P2 is not None:
            points = {"point_coords": prompt.points_1P2, "point_labels": prompt.point_labels_1P}
        heads, _ = track_step(
            self._network, frames, {}, points=points, mask_B1SS=prompt.mask_11SS, prompted=True
        )
        _, _, _, logits_11HW, _, pointer_1C, score_11 = heads
        return DecodedMasks(logits_B1HW=logits_11HW, pointer_BC=pointer_1C, score_B1=score_11)

    def track(
        self, frames: FrameStep, bank: MemoryBank
    ) -> tuple[DecodedMasks, torch.Tensor, torch.Tensor]:
        """Run SAM2Base._track_step, which also returns the features that it attends to."""
        heads, attended_BCHW = track_step(self._network, frames, bank.outputs)
        _, _, _, logits_B1HW, mask_B1SS, pointer_BC, score_B1 = heads
        masks = DecodedMasks(logits_B1HW=logits_B1HW, pointer_BC=pointer_BC, score_B1=score_B1)
        return masks, mask_B1SS, attended_BCHW

    def attend(self, frames: FrameStep, bank: MemoryBank) -> torch.Tensor:
        """Run SAM2Base._prepare_memory_conditioned_features as on a later frame."""
        return self._network._prepare_memory_conditioned_features(
            frame_idx=frames.step,
            is_init_cond_frame=False,
            current_vision_feats=frames.levels_NBC[-1:],
            current_vision_pos_embeds=[frames.positions_NBC],
            feat_sizes=frames.sizes[-1:],
            output_dict=bank.outputs,
            num_frames=frames.num_steps,
        )

    def encode_memory(
        self,
        frames: FrameStep,
        mask_B1SS: torch.Tensor,
        score_B1: torch.Tensor,
        *,
        dtype: torch.dtype,
    ) -> NewMemory:
        """Run SAM2Base._encode_new_memory."""
        memory_BCHW, positions = self._network._encode_new_memory(
            current_vision_feats=frames.levels_NBC,
            feat_sizes=frames.sizes,
            pred_masks_high_res=mask_B1SS,
            object_score_logits=score_B1,
            is_mask_from_pts=frames.step == 0,
        )
        return NewMemory(
            stored=memory_BCHW.to(dtype), positions=positions[-1], features_BCHW=memory_BCHW
        )

    def propose_masks(
        self, frames: FrameStep, points_B2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode three masks for every point, like sam2's SAM2ImagePredictor."""
        network = self._network
        frame_1CHW = network._prepare_memory_conditioned_features(
            frame_idx=0,
            is_init_cond_frame=True,
            current_vision_feats=frames.levels_NBC[-1:],
            current_vision_pos_embeds=[],
            feat_sizes=frames.sizes[-1:],
            output_dict={},
            num_frames=1,
        )
        labels_B1 = torch.full((len(points_B2), 1), _ON_SUBJECT, dtype=torch.int32)
        sparse, dense = network.sam_prompt_encoder(
            points=(points_B2[:, None], labels_B1.to(network.device)), boxes=None, masks=None
        )
        logits_BMHW, iou_BM, _, _ = network.sam_mask_decoder(
            image_embeddings=frame_1CHW,
            image_pe=network.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=True,
            high_res_features=frames.maps()[:-1] or None,
        )
        return logits_BMHW, iou_BM


def track_step(
    network: Any,
    frames: FrameStep,
    outputs: dict[str, Any],
    *,
    points: dict[str, Any] | None = None,
    mask_B1SS: torch.Tensor | None = None,
    prompted: bool = False,
) -> tuple[Any, torch.Tensor]:
    """Run SAM2Base._track_step; return the mask heads' outputs and the features they got."""
    _, heads, _, features_BCHW = network._track_step(
        frame_idx=frames.step,
        is_init_cond_frame=prompted,
        current_vision_feats=frames.levels_NBC,
        current_vision_pos_embeds=[frames.positions_NBC],
        feat_sizes=frames.sizes,
        point_inputs=points,
        mask_inputs=mask_B1SS,
        output_dict=outputs,
        num_frames=frames.num_steps,
        track_in_reverse=False,
        prev_sam_mask_logits=None,
    )
    return heads, features_BCHW
