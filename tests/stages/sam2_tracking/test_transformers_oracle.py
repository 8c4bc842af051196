"""The tracking engine against another implementation: transformers' Sam2VideoModel.

Point and box prompts only: transformers puts mask prompts into the memory in another way.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    Sam2HieraDetConfig,
    Sam2VideoConfig,
    Sam2VideoInferenceSession,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoModel,
    Sam2VideoPromptEncoderConfig,
    Sam2VisionConfig,
)

from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.inputs import Sam2Prompt, normalise_for_sam2
from stages.sam2_tracking.tracker import (
    TrackedFrame,
    Tracker,
    TrackRequest,
)

SIZE, WIDTH, TRUNK_WIDTH = 128, 128, 16
MEMORY_WIDTH = 64  # transformers knows no other
CPU = torch.device("cpu")
RENAMED: list[tuple[str, Any]] = [
    # In this order; the first group tells layers apart that the later names would mix up.
    (r"encoder\.12\.", "final_conv."),
    (r"mask_downsampler\.encoder\.(\d+)\.", lambda m: _downsampler_layer(int(m[1]))),
    (r"(_head|_mlps\.\d+|obj_ptr_proj)\.layers\.0\.", r"\1.proj_in."),
    (r"(_head|_mlps\.\d+|obj_ptr_proj)\.layers\.2\.", r"\1.proj_out."),
    (r"(_head|_mlps\.\d+|obj_ptr_proj)\.layers\.1\.", r"\1.layers.0."),
    (r"mlp\.layers\.0\.", "mlp.proj_in."),
    (r"mlp\.layers\.1\.", "mlp.proj_out."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"\bout_proj\.", "o_proj."),
    (r"\bnorm(\d|_final|\.)", r"layer_norm\1"),
    (r"image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\bdwconv", "depthwise_conv"),
    (r"\bpwconv", "pointwise_conv"),
    (r"\bgamma$", "scale"),
    (r"\bpix_feat_proj\.", "feature_projection."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^sam_prompt_encoder\.pe_layer\..*", "shared_image_embedding.positional_embedding"),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed", "no_memory_embedding"),
    (r"^no_mem_pos_enc", "no_memory_positional_encoding"),
    (r"^no_obj_ptr", "no_object_pointer"),
    (r"^no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    (r"^obj_ptr_proj", "object_pointer_proj"),
]
"""sam2's names of tensors -> transformers'."""


def _downsampler_layer(number: int) -> str:
    kind = ("conv", "layer_norm")[number % 3]
    return f"mask_downsampler.layers.{number // 3}.{kind}."


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sam2 state dict by transformers' names."""
    converted = {}
    corners = [weights[f"sam_prompt_encoder.point_embeddings.{n}.weight"] for n in range(4)]
    for name, weight in weights.items():
        if ".point_embeddings." in name:
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        converted[name] = weight
    converted["prompt_encoder.point_embed.weight"] = torch.cat(corners)
    converted["prompt_encoder.shared_embedding.positional_embedding"] = converted[
        "shared_image_embedding.positional_embedding"
    ]
    return converted


@pytest.fixture(scope="module")
def model(tiny_sam2: tuple[Path, Path]) -> Any:
    """The tiny SAM2 with wider memories and random weights."""
    config = OmegaConf.load(tiny_sam2[0]).model
    attention, memory = "memory_attention", "memory_encoder"
    for key in (
        "image_encoder.neck.d_model",
        "image_encoder.neck.position_encoding.num_pos_feats",
        f"{attention}.d_model",
        f"{attention}.layer.d_model",
        f"{attention}.layer.self_attention.embedding_dim",
        f"{attention}.layer.cross_attention.embedding_dim",
        f"{memory}.in_dim",
        f"{memory}.mask_downsampler.embed_dim",
        f"{memory}.fuser.layer.dim",
    ):
        OmegaConf.update(config, key, WIDTH)
    for key in (
        f"{attention}.layer.cross_attention.kv_in_dim",
        f"{memory}.out_dim",
        f"{memory}.position_encoding.num_pos_feats",
    ):
        OmegaConf.update(config, key, MEMORY_WIDTH)
    file = tiny_sam2[0].with_name("wide.yaml")
    OmegaConf.save({"model": config}, file)
    torch.manual_seed(0)
    model = build_sam2(file, None)
    for name, weight in model.named_parameters():
        if name.endswith("gamma"):
            weight.normal_(std=0.1)
        elif "pos_embed" in name or (name.endswith("bias") and not weight.any()):
            weight.normal_(std=0.02)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    return model


def oracle_of(model: Any) -> Sam2VideoModel:
    """The same architecture and weights in transformers."""
    widths = [TRUNK_WIDTH * 2**stage for stage in range(4)]
    grids = [[SIZE // stride] * 2 for stride in (4, 8, 16)]
    trunk = Sam2HieraDetConfig(
        hidden_size=TRUNK_WIDTH,
        image_size=[SIZE, SIZE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=widths,
        global_attention_blocks=[3],
    )
    config = Sam2VideoConfig(
        vision_config=Sam2VisionConfig(
            backbone_config=trunk,
            backbone_channel_list=widths[::-1],
            backbone_feature_sizes=grids,
            fpn_hidden_size=WIDTH,
        ),
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=WIDTH, image_size=SIZE),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(hidden_size=WIDTH),
        image_size=SIZE,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=grids[-1],
        memory_encoder_hidden_size=WIDTH,
        memory_encoder_output_channels=MEMORY_WIDTH,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=4 * WIDTH,
    )
    oracle = Sam2VideoModel(config).eval()
    oracle.load_state_dict(convert(model.state_dict()), strict=True)
    return oracle


def track_with(
    oracle: Sam2VideoModel, frames_TSS3: np.ndarray, prompt: Sam2Prompt
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Mask logits, score, and the output of memory attention, frame by frame."""
    session = Sam2VideoInferenceSession(
        video=normalise_for_sam2(frames_TSS3, CPU),
        video_height=SIZE,
        video_width=SIZE,
        dtype=torch.float32,
    )
    index = session.obj_id_to_idx(1)
    assert prompt.points_1P2 is not None and prompt.point_labels_1P is not None
    session.add_point_inputs(
        index,
        0,
        {
            "point_coords": prompt.points_1P2[:, None],
            "point_labels": prompt.point_labels_1P[:, None],
        },
    )
    session.obj_with_new_inputs = [1]
    attended: list[torch.Tensor] = []
    hook = oracle.memory_attention.register_forward_hook(
        lambda module, inputs, output: attended.append(output)
    )
    tracked = []
    for t in range(len(frames_TSS3)):
        attended.clear()
        output = oracle(session, frame_idx=t)
        tracked.append(
            (
                output.pred_masks[0, 0],
                output.object_score_logits.flatten()[0],
                attended[0] if attended else None,
            )
        )
    hook.remove()
    return tracked


def track(model: Any, frames_TSS3: np.ndarray, prompt: Sam2Prompt) -> list[TrackedFrame]:
    tracker = Tracker(model, precision="fp32")
    encoded = tracker.encode(frames_TSS3)
    request = TrackRequest(encoded=encoded, prompt=prompt, order=range(encoded.num_frames))
    return [frame for (frame,) in tracker.track([request])]


def values_of(frame: TrackedFrame) -> dict[str, torch.Tensor]:
    return {
        "mask": frame.mask_logits_HW,
        "score": frame.object_score,
        "attended": frame.features["memory_attention"],
    }


def effect_of_rounding(
    nudged_model: Any, ours: list[TrackedFrame], frames_TSS3: np.ndarray, prompt: Sam2Prompt
) -> dict[str, float]:
    """How far the memories that are a step off carry each value, at most, on any frame."""
    changes: dict[str, list[float]] = {"mask": [], "score": [], "attended": []}
    for frame, other in zip(ours, track(nudged_model, frames_TSS3, prompt), strict=True):
        for name, value in values_of(frame).items():
            changes[name].append(float((value - values_of(other)[name]).abs().max()))
    return {name: max(values) for name, values in changes.items()}


PROMPTS = {
    "one point": ([[54.0, 64.0]], [1]),
    "points on and off": ([[54.0, 64.0], [70.0, 50.0], [110.0, 100.0]], [1, 1, 0]),
    "box": ([[18.0, 32.0], [62.0, 98.0]], [2, 3]),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_points_and_boxes_are_tracked_as_transformers_does(
    kind: str,
    model: Any,
    draw_frames: Callable[..., np.ndarray],
    nudged: Callable[[Any], Any],
) -> None:
    frames_TSS3 = draw_frames(20, SIZE, SIZE)  # more than the bank holds
    points, labels = PROMPTS[kind]
    prompt = Sam2Prompt(
        points_1P2=torch.tensor([points]),
        point_labels_1P=torch.tensor([labels], dtype=torch.int32),
    )

    ours = track(model, frames_TSS3, prompt)
    theirs = track_with(oracle_of(model), frames_TSS3, prompt)
    rounding = effect_of_rounding(nudged(model), ours, frames_TSS3, prompt)

    assert sum(frame.visible for frame in ours) > 10
    for frame, (mask_HW, score, attended) in zip(ours, theirs, strict=True):
        expected = {"mask": mask_HW, "score": score}
        if frame.index > 0:  # transformers too skips memory attention on the prompted frame
            assert attended is not None
            expected["attended"] = attended.squeeze().T.reshape(WIDTH, SIZE // 16, SIZE // 16)
        for name, value in expected.items():
            bound = 10 * rounding[name]
            assert bound < 2**-8 * float(value.abs().max()), "rounding would hide a difference"
            torch.testing.assert_close(values_of(frame)[name], value, atol=bound, rtol=0)
