"""Tracks subjects with SAM2, in any direction, from one encoding of each clip's frames.

The subject extraction and the prompt sources drive it. It calls the single-frame step of the model
that `sam2_tracker.build_sam2` makes, so that memory features come out and every frame passes the
image encoder once; equal to sam2's SAM2VideoPredictor on the same weights.
"""

# Legend: T frame, S side of SAM2's square input, L level of the image encoder, N position on a
# level (row-major) or prompt or point, B stream of a batch, C channel, H W grid.

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch._dynamo.exc import TorchDynamoException

from stages.config import Precision
from stages.extract_features.config import FeatureKind
from stages.extract_features.encoded_frames import (
    EncodedFrames,
    FrameStore,
    KeepEncoded,
    gather_levels,
    open_store,
)
from stages.extract_features.extraction import DTYPES
from stages.extract_features.mask_decoding import MaskProposals, propose_masks
from stages.extract_features.memory_bank import MemoryBank
from stages.extract_features.sam2_inputs import Sam2Prompt, normalise_for_sam2

ALL_FEATURES: tuple[FeatureKind, ...] = get_args(FeatureKind)
"""Every kind of feature that a track can give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackRequest:
    """One stream: a subject of a clip, followed over its frames in some order."""

    encoded: EncodedFrames
    prompt: Sam2Prompt
    """The subject on the first frame of `order`."""
    order: Sequence[int]
    """The frames in the order they are visited, at least two. Backward tracking is forward
    tracking over the reversed order: sam2's own reverse mode changes the temporal encodings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedFrame:
    """One visited frame of one stream. All tensors are on the tracker's device, in float32."""

    index: int
    """Position in the clip, whichever direction it was visited in."""
    features: dict[FeatureKind, torch.Tensor]
    """[C, S/16, S/16] each: the frame after memory attention; and the memory stored of it."""
    mask_logits_HW: torch.Tensor
    """[S/4, S/4]; positive on the subject; -1024 everywhere when it is not visible."""
    object_score: torch.Tensor
    """Logit of the subject being visible, a scalar."""

    @property
    def visible(self) -> bool:
        """Whether the score is positive and the mask is not empty; waits for the device."""
        return bool(((self.object_score > 0) & (self.mask_logits_HW > 0).any()).item())


class TwoWayTracker:
    """SAM2 driven frame by frame.

    Args:
        model: What `sam2_tracker.build_sam2` returns, on its device.
        precision: Arithmetic (autocast) and format in which encoded frames are kept.
        frames_per_batch: Frames per pass of the image encoder. Above 1 the results differ from the
            stock predictor's by rounding.
        keep_encoded: Where encoded frames wait for their tracks; changes no value.
        compile: Compile the model's image encoder in place when it is first used; values then
            differ by rounding.
    """

    def __init__(
        self,
        model: Any,
        *,
        precision: Precision,
        frames_per_batch: int = 1,
        keep_encoded: KeepEncoded = "device",
        compile: bool = False,
    ) -> None:
        if model.num_maskmem < 1:
            raise ValueError("the SAM2 configuration has num_maskmem 0, so there are no memories")
        # It would keep the masks of one batch apart, as if they were one video's objects. The
        # stock predictor runs every object by itself, so that it has no effect there either.
        model.non_overlap_masks_for_mem_enc = False
        if compile:
            model.image_encoder.compile(dynamic=False)
        self.model = model
        self.precision: Precision = precision
        self.frames_per_batch = frames_per_batch
        self.keep_encoded: KeepEncoded = keep_encoded
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

        Returns:
            The frames where `keep_encoded` says; to be closed when its tracks are done.

        Raises:
            ValueError: There is no frame, or torch.compile fails.
        """
        if not len(frames_TSS3):
            raise ValueError("there are no frames to encode")
        store = open_store(self.keep_encoded, self.model.device, DTYPES[self.precision])
        try:
            for start in range(0, len(frames_TSS3), self.frames_per_batch):
                batch_TSS3 = frames_TSS3[start : start + self.frames_per_batch]
                positions_NBC, sizes = self._encode_batch(batch_TSS3, store)
        except BaseException:
            store.close()
            raise
        return EncodedFrames(store, positions_NBC=positions_NBC, sizes=sizes)

    def _encode_batch(
        self, frames_TSS3: np.ndarray, store: FrameStore
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        images_T3SS = normalise_for_sam2(frames_TSS3, self.model.device)
        try:
            with self._arithmetic():
                outputs = self.model.forward_image(images_T3SS)
        except TorchDynamoException as error:
            raise ValueError(
                f"torch.compile cannot compile SAM2's image encoder on this machine ({error}); "
                "set extract.teacher.compile=false"
            ) from error
        _, levels_NTC, positions_NTC, sizes = self.model._prepare_backbone_features(outputs)
        for t in range(len(frames_TSS3)):
            store.append([level_NTC[:, t] for level_NTC in levels_NTC])
        return positions_NTC[-1][:, :1].clone(), sizes

    def track(
        self,
        requests: Sequence[TrackRequest],
        *,
        features: Sequence[FeatureKind] = ALL_FEATURES,
    ) -> Iterator[tuple[TrackedFrame, ...]]:
        """Follow every stream from its prompt, side by side, each with a fresh state.

        Streams do not influence each other: several differ from one at a time by rounding only.

        Args:
            requests: The streams, whose orders are equally long; of one clip or of several.
            features: Which features to give of every frame; those left out are not computed where
                they can be spared.

        Yields:
            At each step the frame that each stream visits, in the order of `requests`.

        Raises:
            ValueError: No request; an order has fewer than two frames (SAM2's temporal encoding is
                undefined), another length than the first, or frames that the clip does not have.
        """
        _check_orders(requests)
        return self._steps(requests, features)

    @torch.inference_mode()
    def _steps(
        self, requests: Sequence[TrackRequest], features: Sequence[FeatureKind]
    ) -> Iterator[tuple[TrackedFrame, ...]]:
        bank = MemoryBank.of(self.model)
        for step in range(len(requests[0].order)):
            with self._arithmetic():
                frames = self._step(requests, step, bank, features)
            yield frames

    def _step(
        self,
        requests: Sequence[TrackRequest],
        step: int,
        bank: MemoryBank,
        features: Sequence[FeatureKind],
    ) -> tuple[TrackedFrame, ...]:
        """Visit the streams' `step`-th frames, and store their memories."""
        model, clip = self.model, requests[0].encoded
        levels_NBC = gather_levels([(request.encoded, request.order[step]) for request in requests])
        where = _Where(
            levels_NBC=levels_NBC,
            positions_NBC=clip.positions_NBC.expand(-1, len(requests), -1),
            sizes=clip.sizes,
            step=step,
            num_steps=len(requests[0].order),
        )
        if step == 0:
            prompted = [
                self._prompted(where.stream(b), request.prompt)
                for b, request in enumerate(requests)
            ]
            low_BHW, pointer_BC, score_B1 = (
                torch.cat(outputs) for outputs in zip(*prompted, strict=True)
            )
            # As SAM2VideoPredictor.propagate_in_video_preflight: the memory of a prompted frame is
            # made from its low-resolution mask.
            high_BSS = self.enlarge_mask(low_BHW)
        else:
            _, heads, _, attended_BCHW = model._track_step(
                **where.for_track_step(),
                is_init_cond_frame=False,
                point_inputs=None,
                mask_inputs=None,
                output_dict=bank.outputs,
                prev_sam_mask_logits=None,
            )
            _, _, _, low_BHW, high_BSS, pointer_BC, score_B1 = heads
        memory_BCHW, memory_positions = model._encode_new_memory(
            current_vision_feats=levels_NBC,
            feat_sizes=clip.sizes,
            pred_masks_high_res=high_BSS,
            object_score_logits=score_B1,
            is_mask_from_pts=step == 0,
        )
        bank.store(
            step,
            memory_BCHW=memory_BCHW.to(self.memory_dtype),
            positions_BCHW=memory_positions[-1],
            pointer_BC=pointer_BC,
        )
        wanted: dict[FeatureKind, torch.Tensor] = {}
        if "memory_attention" in features:
            if step == 0:
                attended_BCHW = self._attend(where, bank)
            wanted["memory_attention"] = attended_BCHW
        if "memory_encoder" in features:
            wanted["memory_encoder"] = memory_BCHW
        return tuple(
            TrackedFrame(
                index=request.order[step],
                features={kind: values_BCHW[b].float() for kind, values_BCHW in wanted.items()},
                mask_logits_HW=low_BHW[b, 0].float(),
                object_score=score_B1[b, 0].float(),
            )
            for b, request in enumerate(requests)
        )

    def _prompted(
        self, where: "_Where", prompt: Sam2Prompt
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask logits [1, 1, S/4, S/4], pointer [1, C] and score [1, 1] of one prompted frame."""
        points = None
        if prompt.points_1P2 is not None:
            points = {"point_coords": prompt.points_1P2, "point_labels": prompt.point_labels_1P}
        _, heads, _, _ = self.model._track_step(
            **where.for_track_step(),
            is_init_cond_frame=True,
            point_inputs=points,
            mask_inputs=prompt.mask_11SS,
            output_dict={},
            prev_sam_mask_logits=None,
        )
        _, _, _, low_1HW, _, pointer_1C, score_11 = heads
        return low_1HW, pointer_1C, score_11

    def _attend(self, where: "_Where", bank: MemoryBank) -> torch.Tensor:
        """Let the prompted frames attend to their own memories.

        SAM2 skips memory attention there, which gives features of other statistics than on every
        later frame.
        """
        return self.model._prepare_memory_conditioned_features(
            frame_idx=where.step,
            is_init_cond_frame=False,
            current_vision_feats=where.levels_NBC[-1:],
            current_vision_pos_embeds=[where.positions_NBC],
            feat_sizes=where.sizes[-1:],
            output_dict=bank.outputs,
            num_frames=where.num_steps,
        )

    def enlarge_mask(self, logits_BHW: torch.Tensor) -> torch.Tensor:
        """[B, 1, S/4, S/4] mask logits -> [B, 1, S, S], as SAM2 does it."""
        side = self.model.image_size
        return F.interpolate(
            logits_BHW.float(), size=(side, side), mode="bilinear", align_corners=False
        )

    @torch.inference_mode()
    def masks_on_frame(
        self, encoded: EncodedFrames, index: int, prompts: Sequence[Sam2Prompt]
    ) -> torch.Tensor:
        """What the tracker takes prompts for on a frame: the first step of a track, nothing stored.

        Args:
            encoded: The clip's frames.
            index: The frame that the prompts are on.
            prompts: At least one; each by itself.

        Returns:
            Mask logits [N, S/4, S/4], float32, in the order of `prompts`.
        """
        where = _Where(
            levels_NBC=encoded.levels_at([index]),
            positions_NBC=encoded.positions_NBC,
            sizes=encoded.sizes,
            step=0,
            num_steps=1,
        )
        with self._arithmetic():
            masks_1HW = [self._prompted(where, prompt)[0][0] for prompt in prompts]
        return torch.cat(masks_1HW).float()

    @torch.inference_mode()
    def propose_masks(
        self,
        encoded: EncodedFrames,
        index: int,
        points_N2: torch.Tensor,
        *,
        points_per_batch: int = 64,
    ) -> MaskProposals:
        """Decode three masks for every point, each point a prompt by itself.

        Args:
            encoded: The clip's frames.
            index: The frame that the points are on.
            points_N2: x, y in pixels of SAM2's square, at least one point.
            points_per_batch: Points decoded at once; bounds the memory this takes.
        """
        with self._arithmetic():
            return propose_masks(
                self.model,
                encoded.levels_at([index]),
                encoded.sizes,
                points_N2,
                points_per_batch=points_per_batch,
            )

    @torch.inference_mode()
    def prompt_from_logits(self, mask_logits_HW: torch.Tensor) -> Sam2Prompt:
        """Make a prompt of a tracked mask, such as the backward track's of the forward track's.

        Args:
            mask_logits_HW: [S/4, S/4].

        Raises:
            ValueError: The mask is empty.
        """
        mask_11SS = (self.enlarge_mask(mask_logits_HW[None, None]) > 0).float()
        if not mask_11SS.any():
            raise ValueError("the mask is empty, so that it cannot be a prompt")
        return Sam2Prompt(mask_11SS=mask_11SS)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Where:
    """The frames of one step, and which visit of how many it is."""

    levels_NBC: list[torch.Tensor]
    positions_NBC: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    step: int
    num_steps: int

    def stream(self, b: int) -> "_Where":
        """One stream's part."""
        return _Where(
            levels_NBC=[level_NBC[:, b : b + 1] for level_NBC in self.levels_NBC],
            positions_NBC=self.positions_NBC[:, :1],
            sizes=self.sizes,
            step=self.step,
            num_steps=self.num_steps,
        )

    def for_track_step(self) -> dict[str, Any]:
        """As SAM2Base._track_step names them."""
        return {
            "frame_idx": self.step,
            "num_frames": self.num_steps,
            "track_in_reverse": False,
            "current_vision_feats": self.levels_NBC,
            "current_vision_pos_embeds": [self.positions_NBC],
            "feat_sizes": self.sizes,
        }


def _check_orders(requests: Sequence[TrackRequest]) -> None:
    if not requests:
        raise ValueError("there is nothing to track: no request")
    for request in requests:
        length, num_frames = len(request.order), request.encoded.num_frames
        if length < 2:
            raise ValueError(f"tracking needs at least 2 frames, got {length}")
        if length != len(requests[0].order):
            raise ValueError(
                f"orders of {len(requests[0].order)} and {length} frames cannot be tracked side by "
                "side; track those of equal length together"
            )
        if not all(0 <= index < num_frames for index in request.order):
            raise ValueError(
                f"an order visits frames {min(request.order)} to {max(request.order)} of a clip of "
                f"{num_frames} frames"
            )
