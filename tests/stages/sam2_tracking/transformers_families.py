"""Tiny trackers of transformers' three families with random weights, and their own sessions."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    EdgeTamVideoConfig,
    EdgeTamVideoInferenceSession,
    EdgeTamVideoMaskDecoderConfig,
    EdgeTamVideoModel,
    EdgeTamVideoPromptEncoderConfig,
    Sam2VideoInferenceSession,
    Sam3Config,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoInferenceSession,
    Sam3TrackerVideoMaskDecoderConfig,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoPromptEncoderConfig,
    Sam3VideoConfig,
    Sam3VideoModel,
    Sam3VisionConfig,
    Sam3ViTConfig,
)

from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.step import enlarge_mask
from tests.stages.sam2_tracking.transformers_weights import vision_of

WIDTH = 128
SESSIONS = {
    "sam2_video": Sam2VideoInferenceSession,
    "edgetam_video": EdgeTamVideoInferenceSession,
    "sam3_tracker_video": Sam3TrackerVideoInferenceSession,
}


def _widths() -> dict[str, Any]:
    """Of a small model, with a bank that is full after a few frames."""
    return {
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 1,
        "memory_encoder_hidden_size": WIDTH,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 2 * WIDTH,
        "num_maskmem": 4,
        "max_object_pointers_in_encoder": 6,
    }


def tiny_edgetam() -> EdgeTamVideoModel:
    """128 pixels, a Hiera for RepViT, and 8 + 16 latents per memory of 8x8 tokens."""
    config = EdgeTamVideoConfig(
        vision_config=vision_of(128, WIDTH, 16),
        prompt_encoder_config=EdgeTamVideoPromptEncoderConfig(hidden_size=WIDTH, image_size=128),
        mask_decoder_config=EdgeTamVideoMaskDecoderConfig(hidden_size=WIDTH),
        image_size=128,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_attention_rope_k_sizes=[4, 4],
        memory_attention_mlp_hidden_size=32,
        perceiver_resampler_num_latents=8,
        perceiver_resampler_num_latents_2d=16,
        **_widths(),
    )
    return randomised(EdgeTamVideoModel(config))


def sam3_config() -> Sam3TrackerVideoConfig:
    """112 pixels in patches of 14."""
    vit = Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=112,
        pretrain_image_size=56,
        window_size=4,
        global_attn_indexes=[1],
    )
    return Sam3TrackerVideoConfig(
        vision_config=Sam3VisionConfig(backbone_config=vit, fpn_hidden_size=WIDTH),
        prompt_encoder_config=Sam3TrackerVideoPromptEncoderConfig(
            hidden_size=WIDTH, image_size=112
        ),
        mask_decoder_config=Sam3TrackerVideoMaskDecoderConfig(hidden_size=WIDTH),
        image_size=112,
        memory_attention_feed_forward_hidden_size=32,
        **_widths(),
    )


def tiny_sam3() -> Sam3TrackerVideoModel:
    return randomised(Sam3TrackerVideoModel(sam3_config()))


def whole_sam3() -> Sam3VideoModel:
    """The model as it is published: a detector, the tracker, and a neck for it."""
    tracker = sam3_config()
    small = {"hidden_size": 32, "intermediate_size": 32}
    layers = {"num_layers": 1, "num_attention_heads": 2}
    detector = Sam3Config(
        vision_config=tracker.vision_config.to_dict(),
        text_config={
            **small,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "projection_dim": 32,
        },
        geometry_encoder_config={**small, **layers},
        detr_encoder_config={**small, **layers},
        detr_decoder_config={**small, **layers, "num_queries": 4},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    return randomised(
        Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config=tracker))
    )


def randomised(model: Any, seed: int = 0) -> Any:
    """Give every weight a size at which it matters, and make the subject visible."""
    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=noise)
        if weight.ndim >= 2 and name.endswith("weight"):
            values *= weight[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        weight.data.copy_(values)
    for name, weight in model.named_parameters():
        if name.endswith("pred_obj_score_head.proj_out.bias"):
            weight.data.fill_(8.0)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionFrame:
    """What a session returns for a frame, and what passes through the model."""

    logits_HW: torch.Tensor
    score: torch.Tensor
    attended_CHW: torch.Tensor | None
    """None on the prompted frame."""
    stored_memory: torch.Tensor


def run_session(
    model: Any, images_T3SS: torch.Tensor, prompt: Sam2Prompt, *, as_predictors: bool = False
) -> list[SessionFrame]:
    """Track through the library's inference session.

    Args:
        model: One of the three families.
        images_T3SS: Normalised frames.
        prompt: On frame 0.
        as_predictors: Treat mask prompts like the trackers' own predictors in two things: the
            pointer is that of a single decoded mask, and the memory is of the low-resolution mask.
    """
    session = SESSIONS[model.config.model_type](
        video=images_T3SS,
        video_height=images_T3SS.shape[2],
        video_width=images_T3SS.shape[3],
        dtype=torch.float32,
    )
    index = session.obj_id_to_idx(1)
    if prompt.mask_11SS is not None:
        session.add_mask_inputs(index, 0, prompt.mask_11SS)
    else:
        assert prompt.points_1P2 is not None and prompt.point_labels_1P is not None
        coordinates, labels = prompt.points_1P2[:, None], prompt.point_labels_1P[:, None]
        points = {"point_coords": coordinates, "point_labels": labels}
        session.add_point_inputs(index, 0, points)
    session.obj_with_new_inputs = [1]
    attended: list[torch.Tensor] = []
    condition = model._prepare_memory_conditioned_features
    as_output, decode = model._use_mask_as_output, model._single_frame_forward

    def watching(*, is_initial_conditioning_frame: bool, **inputs: Any) -> torch.Tensor:
        features = condition(is_initial_conditioning_frame=is_initial_conditioning_frame, **inputs)
        if not is_initial_conditioning_frame:
            attended.append(features[0])
        return features

    def like_a_predictor(*inputs: Any) -> Any:
        model._single_frame_forward = partial(decode, multimask_output=False)
        output = as_output(*inputs)
        model._single_frame_forward = decode
        output.high_res_masks = enlarge_mask(model.image_size, output.pred_masks)
        return output

    model._prepare_memory_conditioned_features = watching
    if as_predictors:
        model._use_mask_as_output = like_a_predictor
    try:
        frames = []
        for output in model.propagate_in_video_iterator(session, start_frame_idx=0):
            outputs = session.output_dict_per_obj[0]
            kind = "non_cond_frame_outputs" if output.frame_idx else "cond_frame_outputs"
            frames.append(
                SessionFrame(
                    logits_HW=output.pred_masks[0, 0],
                    score=output.object_score_logits.flatten()[0],
                    attended_CHW=attended.pop() if attended else None,
                    stored_memory=outputs[kind][output.frame_idx]["maskmem_features"],
                )
            )
    finally:
        for name in ("_prepare_memory_conditioned_features", "_use_mask_as_output"):
            vars(model).pop(name, None)
        vars(model).pop("_single_frame_forward", None)
    return frames


def drawn(frames_TSS3: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    """uint8 frames -> [T, 3, S, S], with numpy."""
    scaled = (frames_TSS3 / np.float32(255) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32))
