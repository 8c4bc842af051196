"""A tracker over frames in a given order, with each frame encoded once.

It calls the network's single-frame methods directly, which gives access to the memory features and
lets tracks share the encoded frames. Results equal those of the library's own video predictor with
the same weights.
"""

# Legend: T frame, S side of SAM2's square input, N prompt or point, C channel, H W grid.

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from stages.config import FeatureKind, Precision
from stages.precision import DTYPES
from stages.sam2_tracking.encoder import (
    EncodedFrames,
    KeepEncoded,
    encode_frames,
    gather_levels,
    open_store,
)
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.memory import MemoryBank
from stages.sam2_tracking.model import FrameStep, TrackerModel
from stages.sam2_tracking.sam2_model import Sam2Model
from stages.sam2_tracking.step import MaskProposals, enlarge_mask, propose_masks, visit
from stages.sam2_tracking.transformers_model import TransformersModel, is_from_transformers

ALL_FEATURES: tuple[FeatureKind, ...] = get_args(FeatureKind)
"""Every kind of feature that a track can return."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackRequest:
    """One stream: a subject of a clip, tracked over its frames in a given order."""

    encoded: EncodedFrames
    prompt: Sam2Prompt
    """Prompt on the first frame of `order`."""
    order: Sequence[int]
    """Frame indices in the order they are visited, at least two. Backward tracking is tracking
    in reversed order, since sam2's own reverse mode changes the temporal encodings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedFrame:
    """Outputs for one frame of one stream, as float32 tensors on the tracker's device."""

    index: int
    """Index of the frame in the clip, regardless of direction."""
    features: dict[FeatureKind, torch.Tensor]
    """[C, H, W] each, on the tokens' grid: output of memory attention, of the memory encoder, and
    of the image encoder. May be views of encoded frames: read only."""
    mask_logits_HW: torch.Tensor
    """Four times the tokens' grid; positive on the subject, -1024 everywhere if it is not
    visible."""
    object_score: torch.Tensor
    """Logit of the subject being visible: a scalar."""

    @property
    def visible(self) -> torch.Tensor:
        """Whether the score is positive and the mask is not empty: bool scalar on the device."""
        return (self.object_score > 0) & (self.mask_logits_HW > 0).any()


class EmptyMaskError(ValueError):
    """A tracked mask is empty at the size of the tracker's input."""


class Tracker:
    """Run a tracker's network frame by frame.

    Args:
        model: Network from `opening.build_tracker`, on its device.
        precision: Autocast dtype, and storage dtype of encoded frames.
        frames_per_batch: Frames per pass of the image encoder. Above 1 the results differ from the
            stock predictor's by rounding.
        keep_encoded: Where encoded frames are stored; does not change results.
        compile: Compile the model's image encoder in place on first use; results then differ by
            rounding.
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
        self.model = model
        self._network: TrackerModel = (
            TransformersModel(model) if is_from_transformers(model) else Sam2Model(model)
        )
        if compile:
            # The last batch of a clip is often smaller; two static shapes are faster than a dynamic
            # one.
            self._network.image_encoder.compile(dynamic=False)
        self.precision: Precision = precision
        self.frames_per_batch = frames_per_batch
        self.keep_encoded: KeepEncoded = keep_encoded
        # SAM2VideoPredictor stores memories in bfloat16, even in fp32; fp16 autocast rejects that.
        self.memory_dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.model.device.type, DTYPES[self.precision])

    @torch.inference_mode()
    def encode(self, frames_TSS3: np.ndarray) -> EncodedFrames:
        """Run the image encoder once on every frame.

        Args:
            frames_TSS3: uint8 frames from `inputs.resize_for_sam2`, at least one.

        Returns:
            The encoded frames, stored as `keep_encoded` says. Close them after tracking.

        Raises:
            ValueError: There are no frames, or torch.compile fails.
        """
        return encode_frames(
            self._network,
            frames_TSS3,
            open_store(self.keep_encoded, self.model.device, DTYPES[self.precision]),
            device=self.model.device,
            frames_per_batch=self.frames_per_batch,
            arithmetic=self._arithmetic,
        )

    def track(
        self,
        requests: Sequence[TrackRequest],
        *,
        features: Sequence[FeatureKind] = ALL_FEATURES,
    ) -> Iterator[tuple[TrackedFrame, ...]]:
        """Track every stream from its prompt as one batch, each with a fresh state.

        Streams are independent: batching changes results by rounding only.

        Args:
            requests: The streams, of one or several clips, with orders of equal length.
            features: Features to return for every frame; others are not computed unless SAM2
                itself needs them.

        Yields:
            For each step, the frame that each stream visits, in the order of `requests`.

        Raises:
            ValueError: There are no requests; an order has fewer than two frames (SAM2's temporal
                encoding is undefined), a different length from the first, or an index out of range.
        """
        _check_orders(requests)
        return self._steps(requests, features)

    @torch.inference_mode()
    def _steps(
        self, requests: Sequence[TrackRequest], features: Sequence[FeatureKind]
    ) -> Iterator[tuple[TrackedFrame, ...]]:
        bank = self._network.new_bank()
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
        """Track the `step`-th frame of every stream, and store its memory."""
        clip = requests[0].encoded
        frames = FrameStep(
            levels_NBC=gather_levels(
                [(request.encoded, request.order[step]) for request in requests]
            ),
            positions_NBC=clip.positions_NBC.expand(-1, len(requests), -1),
            sizes=clip.sizes,
            step=step,
            num_steps=len(requests[0].order),
        )
        prompts = [request.prompt for request in requests]
        masks, found = visit(
            self._network,
            frames,
            bank,
            prompts,
            image_size=self.model.image_size,
            memory_dtype=self.memory_dtype,
            features=features,
        )
        return tuple(
            TrackedFrame(
                index=request.order[step],
                features={kind: values_BCHW[b].float() for kind, values_BCHW in found.items()},
                mask_logits_HW=masks.logits_B1HW[b, 0].float(),
                object_score=masks.score_B1[b, 0].float(),
            )
            for b, request in enumerate(requests)
        )

    @torch.inference_mode()
    def masks_on_frame(
        self, encoded: EncodedFrames, index: int, prompts: Sequence[Sam2Prompt]
    ) -> torch.Tensor:
        """Decode the masks of prompts on a frame, as in the first step of a track.

        Args:
            encoded: The clip's frames.
            index: Index of the prompts' frame.
            prompts: At least one; each is decoded separately.

        Returns:
            Mask logits [N, H, W], float32, in the order of `prompts`.
        """
        frame = _single_frame(encoded, index)
        with self._arithmetic():
            masks_1HW = [
                self._network.decode_prompt(frame, prompt).logits_B1HW[0] for prompt in prompts
            ]
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
        """Decode three masks for every point, each point as a separate prompt.

        Args:
            encoded: The clip's frames.
            index: Index of the points' frame.
            points_N2: x, y in pixels of SAM2's square, at least one point.
            points_per_batch: Points decoded at once; bounds memory use.
        """
        with self._arithmetic():
            return propose_masks(
                self._network,
                _single_frame(encoded, index),
                points_N2,
                points_per_batch=points_per_batch,
            )

    @torch.inference_mode()
    def prompt_from_logits(self, mask_logits_HW: torch.Tensor) -> Sam2Prompt:
        """Convert a tracked mask to a prompt, for example for the backward track.

        Args:
            mask_logits_HW: From a tracked frame.

        Raises:
            EmptyMaskError: The mask is empty at SAM2's size.
        """
        mask_11SS = (enlarge_mask(self.model.image_size, mask_logits_HW[None, None]) > 0).float()
        if not mask_11SS.any():
            raise EmptyMaskError("the mask is empty at SAM2's size and cannot be a prompt")
        return Sam2Prompt(mask_11SS=mask_11SS)


def _single_frame(encoded: EncodedFrames, index: int) -> FrameStep:
    return FrameStep(
        levels_NBC=encoded.levels_at([index]),
        positions_NBC=encoded.positions_NBC,
        sizes=encoded.sizes,
        step=0,
        num_steps=1,
    )


def _check_orders(requests: Sequence[TrackRequest]) -> None:
    if not requests:
        raise ValueError("there is nothing to track: requests is empty")
    for request in requests:
        length, num_frames = len(request.order), request.encoded.num_frames
        if length < 2:
            raise ValueError(f"tracking needs at least 2 frames, got {length}")
        if length != len(requests[0].order):
            raise ValueError(
                f"orders of {len(requests[0].order)} and {length} frames cannot be tracked in one "
                "batch; batch orders of equal length"
            )
        if not all(0 <= index < num_frames for index in request.order):
            raise ValueError(
                f"an order visits frames {min(request.order)} to {max(request.order)} of a clip of "
                f"{num_frames} frames"
            )
