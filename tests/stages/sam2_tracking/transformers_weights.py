"""SAM2 in transformers' names and configuration, from a SAM2Base of the sam2 package."""

import re
from typing import Any

import torch
from transformers import (
    Sam2HieraDetConfig,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoModel,
    Sam2VideoPromptEncoderConfig,
    Sam2VisionConfig,
)

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


def vision_of(size: int, width: int, trunk_width: int) -> Sam2VisionConfig:
    """The tiny Hiera of the tests and of the demo."""
    widths = [trunk_width * 2**stage for stage in range(4)]
    return Sam2VisionConfig(
        backbone_config=Sam2HieraDetConfig(
            hidden_size=trunk_width,
            image_size=[size, size],
            blocks_per_stage=[1, 1, 2, 1],
            embed_dim_per_stage=widths,
            global_attention_blocks=[3],
        ),
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[size // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=width,
    )


def to_transformers(model: Any) -> Sam2VideoModel:
    """The same architecture and weights in transformers, for a tiny SAM2Base."""
    size, width = model.image_size, model.hidden_dim
    config = Sam2VideoConfig(
        vision_config=vision_of(
            size, width, model.image_encoder.trunk.patch_embed.proj.out_channels
        ),
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=width, image_size=size),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(hidden_size=width),
        image_size=size,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=model.memory_attention.num_layers,
        memory_attention_feed_forward_hidden_size=(
            model.memory_attention.layers[0].linear1.out_features
        ),
        memory_attention_rope_feat_sizes=[size // 16] * 2,
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=model.mem_dim,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=model.memory_encoder.fuser.layers[0].pwconv1.out_features,
    )
    converted = Sam2VideoModel(config).eval()
    converted.load_state_dict(convert(model.state_dict()), strict=True)
    return converted.requires_grad_(False)
