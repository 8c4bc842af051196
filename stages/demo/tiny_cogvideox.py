"""A tiny CogVideoX pipeline of the official classes, saved as an ordinary diffusers folder.

The weights are random; the VAE has the official compression (4x time, 8x space) and starts as a
downsampler.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from stages.files.tensor_files import umask_modes

MAX_TEXT_TOKENS = 32
"""Caption length in tokens (226 in the official models)."""
_TEXT_WIDTH = 32
_PATCH = 2
_VAE_WIDTHS = (8, 16, 32, 32)
_LATENT_CHANNELS = 8
_NORM_GROUPS = 4


def build_tiny_cogvideox(
    out: Path,
    *,
    height: int,
    width: int,
    num_frames: int,
    captions: Sequence[str],
    seed: int,
    image_to_video: bool = False,
    vae: AutoencoderKLCogVideoX | None = None,
    num_layers: int = 4,
    num_heads: int = 3,
    head_width: int = 32,
) -> None:
    """Write a pipeline folder that `from_pretrained` loads.

    Args:
        out: Output folder.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        num_frames: Frames per video, 8N+1.
        captions: Texts from which the tokenizer's vocabulary is made.
        seed: Random seed of the weights.
        image_to_video: Build the image-to-video pipeline: twice the input channels and learned
            positional embeddings, as in CogVideoX-5b-I2V.
        vae: A fitted VAE; None creates a random one.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        head_width: Channels per head, a multiple of 8 (required by the rotary embedding).
    """
    tokenizer = tokenizer_of(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = vae or build_tiny_vae(seed)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=_TEXT_WIDTH,
                d_kv=8,
                d_ff=2 * _TEXT_WIDTH,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        latent_channels = vae.config.latent_channels
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=num_heads,
            attention_head_dim=head_width,
            in_channels=latent_channels * (2 if image_to_video else 1),
            out_channels=latent_channels,
            time_embed_dim=64,
            text_embed_dim=_TEXT_WIDTH,
            num_layers=num_layers,
            sample_width=width // 8,
            sample_height=height // 8,
            sample_frames=num_frames,
            patch_size=_PATCH,
            max_text_seq_length=MAX_TEXT_TOKENS,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=image_to_video,
        )
    pipeline_class = CogVideoXImageToVideoPipeline if image_to_video else CogVideoXPipeline
    pipeline = pipeline_class(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=_scheduler(),
    )
    with umask_modes(out):
        pipeline.save_pretrained(out)


def _scheduler() -> CogVideoXDPMScheduler:
    """The scheduler of CogVideoX-5b."""
    return CogVideoXDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def tokenizer_of(captions: Sequence[str]) -> T5Tokenizer:
    """A unigram tokenizer: one token per word of the captions, and letters for other words.

    Scores are log frequencies; letters score far lower, so known words are never split.
    """
    words = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption))
    spaced = Counter(word for caption in captions for word in caption.split())
    pieces = Counter({f"▁{word}": count for word, count in spaced.items()})
    pieces.update({f"▁{word}": count for word, count in words.items()})
    pieces.update({word: count for word, count in words.items() if not word.isalnum()})
    total = pieces.total()
    scored = {
        piece: math.log(count / total) for piece, count in sorted(pieces.items()) if len(piece) > 1
    }
    letters = {chr(code) for code in range(33, 127)} | set("".join(pieces)) | {"▁"}
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += list(scored.items())
    vocabulary += [(letter, -20.0) for letter in sorted(letters - set(scored))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TEXT_TOKENS)


def build_tiny_vae(
    seed: int,
    *,
    widths: tuple[int, int, int, int] = _VAE_WIDTHS,
    latent_channels: int = _LATENT_CHANNELS,
    norm_groups: int = _NORM_GROUPS,
) -> AutoencoderKLCogVideoX:
    """Build a VAE initialised to downsample: three latent channels hold the mean colour of 8x8.

    From there it learns details in a few hundred steps; from the usual random weights it takes
    thousands. Returned in evaluation mode.

    Args:
        seed: Random seed of the weights.
        widths: Channels of the blocks, multiples of `norm_groups` and at least 8.
        latent_channels: Channels of the latents, at least 3.
        norm_groups: Groups of the normalisations.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=widths,
            latent_channels=latent_channels,
            layers_per_block=1,
            norm_num_groups=norm_groups,
            temporal_compression_ratio=4,
            scaling_factor=1.0,
        )
        _start_as_thumbnail(vae)
    return vae.eval()


@torch.no_grad()
def _start_as_thumbnail(vae: AutoencoderKLCogVideoX) -> None:
    for name, module in vae.named_modules():
        if name.endswith("conv2.conv"):
            module.weight.mul_(0.2)  # residual branches start small
        elif name.endswith(("conv_shortcut.conv", "conv_shortcut")) and hasattr(module, "weight"):
            _init_identity(module)
        elif name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            _init_identity(module, mean="down" in name)
        elif name.endswith("conv_y.conv"):
            module.weight.mul_(0.2)
            module.bias.fill_(1.0)
        elif name.endswith("conv_b.conv"):
            module.weight.mul_(0.2)
            module.bias.zero_()
    # silu(x) - silu(-x) = x, so pairs of opposite sign pass the last activation unchanged.
    _split_signs(vae.encoder.conv_in.conv)
    _split_signs(vae.decoder.conv_in.conv)
    _merge_signs(vae.encoder.conv_out.conv)
    _merge_signs(vae.decoder.conv_out.conv)
    log_variance = vae.encoder.conv_out.conv
    latent_channels = vae.config.latent_channels
    log_variance.weight[latent_channels:].zero_()
    log_variance.bias[latent_channels:].fill_(-4.0)


def _init_identity(conv: nn.Conv2d | nn.Conv3d, *, mean: bool = False) -> None:
    """Initialise to the identity (or a 2x2 mean) per channel, plus small random weights."""
    weight = conv.weight
    weight.mul_(0.3)
    if conv.bias is not None:
        conv.bias.zero_()
    for out in range(weight.shape[0]):
        kernel = weight[out, out % weight.shape[1]]
        if mean:
            if out < 8:
                kernel[:2, :2] += 0.25
        else:
            kernel[_centre(kernel)] += 1.0


def _split_signs(conv: nn.Conv3d) -> None:
    """Channels 0-2 copy the first three inputs, channels 3-5 their negatives."""
    for channel in range(3):
        for out, sign in ((channel, 1.0), (channel + 3, -1.0)):
            conv.weight[out].mul_(0.1)
            kernel = conv.weight[out, channel]
            kernel[_centre(kernel)] += sign


def _merge_signs(conv: nn.Conv3d) -> None:
    for channel in range(3):
        conv.weight[channel].mul_(0.1)
        for source, sign in ((channel, 1.0), (channel + 3, -1.0)):
            kernel = conv.weight[channel, source]
            kernel[_centre(kernel)] += sign


def _centre(kernel: torch.Tensor) -> tuple[int, ...]:
    """Index of the centre tap in space and, since the convolution is causal, the last in time."""
    middle = tuple(size // 2 for size in kernel.shape)
    return (kernel.shape[0] - 1, *middle[1:]) if kernel.ndim == 3 else middle
