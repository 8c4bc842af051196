"""Tracks one clip's subject with SAM2, forward and backward, from one encoding of its frames.

`teacher` takes the features from here. Drives the single-frame step of the model that
`sam2_tracker.build_sam2` makes, so that memory features come out and every frame passes the image
encoder once; equal to sam2's SAM2VideoPredictor on the same weights.
"""

# Legend: T frame, S side of SAM2's square input, L level of the image encoder, N position on a
# level (row-major), B batch (always 1), C channel, H W grid.

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from stages.config import Precision
from stages.extract_features.extraction import DTYPES
from stages.extract_features.sam2_inputs import Sam2Prompt, normalise_for_sam2

FeatureKind = Literal["memory_attention", "memory_encoder"]


class SubjectLostError(Exception):
    """The forward track ends without a mask, so that there is nothing to track backward from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedFrames:
    """What the image encoder says of every frame; both directions read it."""

    levels_TNC: tuple[torch.Tensor, ...]
    """Highest resolution first, in the tracker's storage format."""
    positions_NBC: torch.Tensor
    """Position encoding of the last level, the same for every frame."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level."""

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.levels_TNC[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedFrame:
    """One visited frame. All tensors are on the tracker's device, in float32."""

    index: int
    """Position in the clip, whichever direction it was visited in."""
    features: dict[FeatureKind, torch.Tensor]
    """[C, S/16, S/16] each: the frame after memory attention; and the memory stored of it."""
    mask_logits_HW: torch.Tensor
    """[S/4, S/4]; positive on the subject; -1024 everywhere when it is not visible."""
    object_score: torch.Tensor
    """Logit of the subject being visible, a scalar."""


@dataclass(slots=True)
class _MemoryBank:
    """The outputs that later steps may look at, in the layout SAM2Base reads; old ones go."""

    memory_reach: int
    pointer_reach: int
    outputs: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=lambda: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    )

    @classmethod
    def of(cls, model: Any) -> "_MemoryBank":
        # With a stride r the memories lie at multiples of r, so the oldest can be r - 1 further.
        stride = model.memory_temporal_stride_for_eval
        return cls(
            memory_reach=max(1, 1 + (model.num_maskmem - 2) * stride),
            pointer_reach=model.max_obj_ptrs_in_encoder - 1,
        )

    def store(self, step: int, entry: dict[str, Any]) -> None:
        """Keep the step's memory and pointer; drop what no later step can reach."""
        if step == 0:
            self.outputs["cond_frame_outputs"][0] = entry
            return
        recent = self.outputs["non_cond_frame_outputs"]
        recent[step] = entry
        for old in [s for s in recent if s <= step - self.memory_reach]:
            recent[old]["maskmem_features"] = None
            if old <= step - self.pointer_reach:
                del recent[old]


class TwoWayTracker:
    """SAM2 driven frame by frame.

    Args:
        model: What `sam2_tracker.build_sam2` returns, on its device.
        precision: Arithmetic (autocast) and format in which encoded frames are kept.
        frames_per_batch: Frames per pass of the image encoder. Above 1 the results differ from the
            stock predictor's by rounding.
    """

    def __init__(self, model: Any, *, precision: Precision, frames_per_batch: int = 1) -> None:
        if model.num_maskmem < 1:
            raise ValueError("the SAM2 configuration has num_maskmem 0, so there are no memories")
        self.model = model
        self.precision: Precision = precision
        self.frames_per_batch = frames_per_batch
        # SAM2VideoPredictor keeps memories in bfloat16, even in fp32; fp16 autocast refuses that.
        self.memory_dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.model.device.type, DTYPES[self.precision])

    @torch.inference_mode()
    def encode(self, frames_TSS3: np.ndarray) -> EncodedFrames:
        """Run the image encoder over every frame once.

        Args:
            frames_TSS3: uint8 frames, at least one, as `sam2_inputs.resize_for_sam2` makes them.
        """
        num_frames = len(frames_TSS3)
        levels: list[torch.Tensor] = []
        for start in range(0, num_frames, self.frames_per_batch):
            batch_T3SS = normalise_for_sam2(
                frames_TSS3[start : start + self.frames_per_batch], self.model.device
            )
            with self._arithmetic():
                encoded = self.model.forward_image(batch_T3SS)
                _, batch_LNTC, positions, sizes = self.model._prepare_backbone_features(encoded)
            if not levels:
                levels = [
                    level.new_empty(
                        (num_frames, level.shape[0], level.shape[2]), dtype=DTYPES[self.precision]
                    )
                    for level in batch_LNTC
                ]
            for level, batch_NTC in zip(levels, batch_LNTC, strict=True):
                level[start : start + self.frames_per_batch] = batch_NTC.transpose(0, 1)
        return EncodedFrames(
            levels_TNC=tuple(levels),
            positions_NBC=positions[-1][:, :1].clone(),
            sizes=tuple(sizes),
        )

    @torch.inference_mode()
    def track(
        self, encoded: EncodedFrames, prompt: Sam2Prompt, *, backward: bool = False
    ) -> Iterator[TrackedFrame]:
        """Track with a fresh state from the prompted frame to the other end of the clip.

        Backward tracking is forward tracking over the reversed order: sam2's own reverse mode
        changes the temporal encodings.

        Args:
            encoded: The clip's frames.
            prompt: The subject on frame 0, or on the last frame when `backward`.
            backward: Visit T-1, ..., 0 instead of 0, ..., T-1.

        Yields:
            The frames in the order they are visited.

        Raises:
            ValueError: The clip has fewer than two frames (SAM2's temporal encoding is undefined).
        """
        num_frames = encoded.num_frames
        if num_frames < 2:
            raise ValueError(f"tracking needs at least 2 frames, got {num_frames}")
        bank = _MemoryBank.of(self.model)
        for step in range(num_frames):
            index = num_frames - 1 - step if backward else step
            with self._arithmetic():
                frame = self._step(encoded, index, step, bank, prompt if step == 0 else None)
            yield frame

    def _step(
        self,
        encoded: EncodedFrames,
        index: int,
        step: int,
        bank: _MemoryBank,
        prompt: Sam2Prompt | None,
    ) -> TrackedFrame:
        """Track frame `index`, the `step`-th visited, and store its memory."""
        model = self.model
        vision_NBC = [level[index : index + 1].transpose(0, 1) for level in encoded.levels_TNC]
        where: dict[str, Any] = {
            "frame_idx": step,
            "output_dict": bank.outputs,
            "num_frames": encoded.num_frames,
            "track_in_reverse": False,
        }
        _, heads, _, attended_BCHW = model._track_step(
            **where,
            is_init_cond_frame=prompt is not None,
            current_vision_feats=vision_NBC,
            current_vision_pos_embeds=[encoded.positions_NBC],
            feat_sizes=encoded.sizes,
            point_inputs=_point_inputs(prompt),
            mask_inputs=None if prompt is None else prompt.mask_11SS,
            prev_sam_mask_logits=None,
        )
        _, _, _, low_BHW, high_BSS, pointer_BC, score_B1 = heads
        if prompt is not None:
            # As SAM2VideoPredictor.propagate_in_video_preflight: the memory of a prompted frame is
            # made from its low-resolution mask.
            high_BSS = self.enlarge_mask(low_BHW)
        memory_BCHW, memory_positions = model._encode_new_memory(
            current_vision_feats=vision_NBC,
            feat_sizes=encoded.sizes,
            pred_masks_high_res=high_BSS,
            object_score_logits=score_B1,
            is_mask_from_pts=prompt is not None,
        )
        entry = {
            "maskmem_features": memory_BCHW.to(self.memory_dtype),
            "maskmem_pos_enc": memory_positions,
            "obj_ptr": pointer_BC,
        }
        bank.store(step, entry)
        if prompt is not None:
            # SAM2 skips memory attention here, which gives features of other statistics than on
            # every later frame; now that its memory is stored, the frame can attend to it.
            attended_BCHW = model._prepare_memory_conditioned_features(
                **where,
                is_init_cond_frame=False,
                current_vision_feats=vision_NBC[-1:],
                current_vision_pos_embeds=[encoded.positions_NBC],
                feat_sizes=encoded.sizes[-1:],
            )
        return TrackedFrame(
            index=index,
            features={
                "memory_attention": attended_BCHW[0].float(),
                "memory_encoder": memory_BCHW[0].float(),
            },
            mask_logits_HW=low_BHW[0, 0].float(),
            object_score=score_B1.flatten()[0].float(),
        )

    def enlarge_mask(self, logits_BHW: torch.Tensor) -> torch.Tensor:
        """[B, 1, S/4, S/4] mask logits -> [B, 1, S, S], as SAM2 does it."""
        side = self.model.image_size
        return F.interpolate(
            logits_BHW.float(), size=(side, side), mode="bilinear", align_corners=False
        )

    @torch.inference_mode()
    def prompt_from_track(self, frame: TrackedFrame) -> Sam2Prompt:
        """Make the prompt of the backward track from the forward track's last frame.

        Raises:
            SubjectLostError: The subject is not visible there.
        """
        mask_11SS = (self.enlarge_mask(frame.mask_logits_HW[None, None]) > 0).float()
        if not mask_11SS.any():
            raise SubjectLostError(
                f"the forward track has no mask on frame {frame.index} "
                f"(object score {frame.object_score.item():.2f})"
            )
        return Sam2Prompt(mask_11SS=mask_11SS)


def _point_inputs(prompt: Sam2Prompt | None) -> dict[str, torch.Tensor] | None:
    if prompt is None or prompt.points_1P2 is None:
        return None
    assert prompt.point_labels_1P is not None
    return {"point_coords": prompt.points_1P2, "point_labels": prompt.point_labels_1P}
