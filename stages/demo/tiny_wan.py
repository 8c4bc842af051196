"""A tiny Wan 2.1 pipeline of the official classes with random weights, as a diffusers folder.

The VAE has the official compression (4x time, 8x space). Nothing of it is trained: it shows that
the whole road runs, not what a video looks like.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from stages.demo.tiny_cogvideox import tokenizer_of
from stages.files.tensor_files import umask_modes

_TEXT_WIDTH = 16
_IMAGE_WIDTH = 16
_LATENT_CHANNELS = 4
_MASK_CHANNELS = 4


def build_tiny_wan(
    out: Path,
    *,
    captions: Sequence[str],
    seed: int,
    image_to_video: bool = False,
    num_layers: int = 2,
    num_heads: int = 2,
    head_width: int = 12,
) -> None:
    """Write a pipeline folder that `from_pretrained` loads.

    Args:
        out: Output folder.
        captions: Texts from which the tokenizer's vocabulary is made.
        seed: Random seed of the weights.
        image_to_video: Build the image-to-video pipeline, with a tiny CLIP.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        head_width: Channels per head, an even number from 12 (required by the rotary embedding).
    """
    tokenizer = tokenizer_of(captions)
    width = num_heads * head_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=_TEXT_WIDTH,
                d_kv=8,
                d_ff=2 * _TEXT_WIDTH,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=_LATENT_CHANNELS,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[0.5, 0.8, 1.1, 1.4],
        )
        condition = _MASK_CHANNELS + _LATENT_CHANNELS
        transformer = WanTransformer3DModel(
            num_attention_heads=num_heads,
            attention_head_dim=head_width,
            in_channels=_LATENT_CHANNELS + (condition if image_to_video else 0),
            out_channels=_LATENT_CHANNELS,
            text_dim=_TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=2 * width,
            num_layers=num_layers,
            image_dim=_IMAGE_WIDTH if image_to_video else None,
            added_kv_proj_dim=width if image_to_video else None,
            rope_max_seq_len=64,
        )
        parts = {
            "tokenizer": tokenizer,
            "text_encoder": text_encoder.eval(),
            "vae": vae.eval(),
            "transformer": transformer.eval(),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        }
        if image_to_video:
            parts |= _image_parts()
    pipeline = (WanImageToVideoPipeline if image_to_video else WanPipeline)(**parts)
    with umask_modes(out):
        pipeline.save_pretrained(out)


def _image_parts() -> dict[str, Any]:
    # Imported here: without torchvision, transformers logs a line on import.
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=_IMAGE_WIDTH,
            intermediate_size=2 * _IMAGE_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return {"image_encoder": encoder.eval(), "image_processor": processor}
