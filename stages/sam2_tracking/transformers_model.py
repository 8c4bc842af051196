"""SAM2, EdgeTAM and SAM3's tracker in transformers: calls of their single-frame methods.

Sam2VideoModel, EdgeTamVideoModel and Sam3TrackerVideoModel have the same methods. They differ here
in the normalisation of pixels, and in what a memory is: a map of the tokens' grid, or EdgeTAM's
latents of it.
"""

# Legend: S side of the square input, N position on a level (row-major) or token of a memory, B
# frame or stream of the batch, P point, M mask of a point, C channel, H W grid.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stages.sam2_tracking.inputs import IMAGENET_MEAN, IMAGENET_STD, Sam2Prompt
from stages.sam2_tracking.memory import MemoryBank
from stages.sam2_tracking.model import DecodedMasks, EncodedImages, FrameStep, NewMemory

_ON_SUBJECT = 1
_SAM3 = "sam3_tracker_video"
_SAM3_PIXELS = (0.5, 0.5, 0.5)
"""Mean and standard deviation of SAM3's pixels (facebookresearch/sam3, `sam3_video_inference`)."""


def is_from_transformers(network: Any) -> bool:
    """Whether a network is a model of transformers rather than a SAM2Base."""
    return hasattr(getattr(network, "config", None), "model_type")


@dataclass(frozen=True, slots=True)
class _Session:
    """What transformers' models read of an inference session with one object."""

    output_dict_per_obj: tuple[Mapping[str, Mapping[int, Any]]]
    dtype: torch.dtype
    """Of the memories as they enter memory attention."""


class TransformersModel:
    """A video tracker of transformers as a `TrackerModel`.

    Results equal those of its own inference session, except for mask prompts, which are treated as
    by the trackers' own predictors (facebookresearch/sam2, /EdgeTAM and /sam3): the object pointer
    is that of a single decoded mask, and the memory is computed from the low-resolution mask.
    transformers takes the pointer of the best of three masks, and the mask itself.

    Args:
        network: A Sam2VideoModel, EdgeTamVideoModel or Sam3TrackerVideoModel in evaluation mode.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        is_sam3 = network.config.model_type == _SAM3
        self.pixel_mean = _SAM3_PIXELS if is_sam3 else IMAGENET_MEAN
        self.pixel_std = _SAM3_PIXELS if is_sam3 else IMAGENET_STD
        self._resamples_memories = hasattr(network, "spatial_perceiver")
        network.memory_attention.register_forward_hook(_without_first_axis)

    @property
    def image_encoder(self) -> torch.nn.Module:
        """Backbone and neck."""
        return self._network.vision_encoder

    def new_bank(self) -> MemoryBank:
        """Return an empty bank."""
        config = self._network.config
        return MemoryBank(
            memory_reach=max(1, config.num_maskmem - 1),
            pointer_reach=config.max_object_pointers_in_encoder - 1,
        )

    def encode_images(self, images_B3SS: torch.Tensor) -> EncodedImages:
        """Run get_image_features."""
        outputs = self._network.get_image_features(images_B3SS, return_dict=True)
        return EncodedImages(
            levels_NBC=outputs.fpn_hidden_states,
            positions_NBC=outputs.fpn_position_encoding[-1],
            sizes=[(height, width) for height, width in self._network.backbone_feature_sizes],
        )

    def decode_prompt(self, frames: FrameStep, prompt: Sam2Prompt) -> DecodedMasks:
        """Decode points, or return a mask as it is with an object pointer."""
        network = self._network
        *finer_1CHW, last_1CHW = frames.maps()
        if prompt.points_1P2 is None:
            assert prompt.mask_11SS is not None
            given = network._use_mask_as_output(last_1CHW, finer_1CHW, prompt.mask_11SS)
            pointed = network._single_frame_forward(
                input_masks=network.mask_downsample(prompt.mask_11SS),
                image_embeddings=[*finer_1CHW, last_1CHW],
                multimask_output=False,
            )
            return _masks(given, pointer=pointed.object_pointer)
        assert prompt.point_labels_1P is not None
        points = {
            "point_coords": prompt.points_1P2[:, None],
            "point_labels": prompt.point_labels_1P[:, None],
        }
        return _masks(
            network._single_frame_forward(
                input_points=points["point_coords"],
                input_labels=points["point_labels"],
                image_embeddings=[*finer_1CHW, self._condition(frames, None)],
                multimask_output=network._use_multimask(True, points),
            )
        )

    def track(
        self, frames: FrameStep, bank: MemoryBank
    ) -> tuple[DecodedMasks, torch.Tensor, torch.Tensor]:
        """Attend to memories, then decode; decoded one by one, since _single_frame_forward mixes
        up the best masks of a batch."""
        attended_BCHW = self.attend(frames, bank)
        finer_BCHW = frames.maps()[:-1]
        decoded = [
            self._network._single_frame_forward(
                image_embeddings=[one[b : b + 1] for one in (*finer_BCHW, attended_BCHW)],
                multimask_output=self._network._use_multimask(False, None),
            )
            for b in range(len(attended_BCHW))
        ]
        masks = [_masks(one) for one in decoded]
        joined = DecodedMasks(
            logits_B1HW=torch.cat([one.logits_B1HW for one in masks]),
            pointer_BC=torch.cat([one.pointer_BC for one in masks]),
            score_B1=torch.cat([one.score_B1 for one in masks]),
        )
        return joined, torch.cat([one.high_res_masks for one in decoded]), attended_BCHW

    def attend(self, frames: FrameStep, bank: MemoryBank) -> torch.Tensor:
        """Run _prepare_memory_conditioned_features as on a later frame."""
        outputs = {
            kind: {step: self._entry(output) for step, output in by_step.items()}
            for kind, by_step in bank.outputs.items()
        }
        return self._condition(frames, _Session((outputs,), frames.levels_NBC[-1].dtype))

    def encode_memory(
        self,
        frames: FrameStep,
        mask_B1SS: torch.Tensor,
        score_B1: torch.Tensor,
        *,
        dtype: torch.dtype,
    ) -> NewMemory:
        """Run _encode_new_memory, which stores SAM2's and SAM3's memories in bfloat16.

        Streams one by one, since EdgeTAM's perceiver takes no batch.
        """
        outputs: list[torch.Tensor] = []
        # Afterwards, it adds the embedding of a hidden subject to the same tensor.
        hook = self._network.memory_encoder.register_forward_hook(
            lambda module, inputs, output: outputs.append(output[0])
        )
        try:
            encoded = [
                self._network._encode_new_memory(
                    current_vision_feats=frames.levels_NBC[-1][:, b : b + 1],
                    pred_masks_high_res=mask_B1SS[b : b + 1],
                    object_score_logits=score_B1[b : b + 1, None],
                    is_mask_from_pts=frames.step == 0,
                )
                for b in range(len(mask_B1SS))
            ]
        finally:
            hook.remove()
        return NewMemory(
            stored=torch.cat([self._swapped(memory) for memory, _ in encoded]),
            positions=self._swapped(encoded[0][1]),
            features_BCHW=torch.cat(outputs),
        )

    def propose_masks(
        self, frames: FrameStep, points_B2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode three masks for every point."""
        network = self._network
        labels_1B1 = torch.full((1, len(points_B2), 1), _ON_SUBJECT, dtype=torch.int32)
        sparse, dense = network.prompt_encoder(
            input_points=points_B2[None, :, None],
            input_labels=labels_1B1.to(points_B2.device),
            input_boxes=None,
            input_masks=None,
        )
        logits_1BMHW, iou_1BM, _, _ = network.mask_decoder(
            image_embeddings=self._condition(frames, None),
            image_positional_embeddings=network.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=frames.maps()[:-1],
        )
        return logits_1BMHW[0], iou_1BM[0]

    def _condition(self, frames: FrameStep, session: _Session | None) -> torch.Tensor:
        """Condition the last level on a session's memories, or on their absence: [B, C, H, W]."""
        return self._network._prepare_memory_conditioned_features(
            inference_session=session,
            frame_idx=frames.step,
            obj_idx=0,
            is_initial_conditioning_frame=session is None,
            current_vision_features=frames.levels_NBC[-1],
            current_vision_positional_embeddings=frames.positions_NBC,
            num_total_frames=frames.num_steps,
        )

    def _entry(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a bank's entry to the layout of transformers' session."""
        memory = output["maskmem_features"]
        return {
            "maskmem_features": None if memory is None else self._swapped(memory),
            "maskmem_pos_enc": self._swapped(output["maskmem_pos_enc"][0]),
            "object_pointer": output["obj_ptr"],
        }

    def _swapped(self, memory: torch.Tensor) -> torch.Tensor:
        """[N, B, C] <-> [B, N, C], the order in the bank; EdgeTAM's latents are in it already."""
        return memory if self._resamples_memories else memory.transpose(0, 1)


def _masks(output: Any, pointer: torch.Tensor | None = None) -> DecodedMasks:
    pointer = output.object_pointer if pointer is None else pointer
    return DecodedMasks(
        logits_B1HW=output.pred_masks,
        pointer_BC=pointer.flatten(0, 1),
        score_B1=output.object_score_logits.reshape(-1, 1),
    )


def _without_first_axis(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of memory attention: [1, B, N, C] -> [B, N, C].

    _prepare_memory_conditioned_features expects this where B > 1, and accepts it where B = 1.
    """
    return output[0] if output.ndim == 4 else output
