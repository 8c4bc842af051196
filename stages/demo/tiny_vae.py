"""A small CogVideoX VAE with the official compression (4x time, 8x space), and its training."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from stages.progress import Task

# Legend: N clip, B batch, T frame, C channel, H W pixels.

_WIDTHS = (8, 16, 32, 32)
_LATENT_CHANNELS = 8
_NORM_GROUPS = 4

_CROP = 64
_CROP_FRAMES = 9
"""One latent frame for the first frame and two more: the shortest clip that exercises every
temporal path."""
_IMAGE_FRACTION = 0.7
"""Fraction of the steps, at the start, that train on single frames; they cost a ninth and suffice
to learn colours."""
_IMAGE_BATCH, _CLIP_BATCH = 4, 2
_LEARNING_RATE = 5e-3
_KL_WEIGHT = 1e-4
_SQUARED_ERROR_WEIGHT = 2.0
"""Weight of the squared error relative to the absolute one; emphasises small bright limbs."""


def build_tiny_vae(seed: int) -> AutoencoderKLCogVideoX:
    """Build a VAE initialised to downsample: three latent channels hold the mean colour of 8x8.

    From there it learns details in a few hundred steps; from the usual random weights it takes
    thousands. Returned in evaluation mode.

    Args:
        seed: Random seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=_WIDTHS,
            latent_channels=_LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=_NORM_GROUPS,
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
    log_variance.weight[_LATENT_CHANNELS:].zero_()
    log_variance.bias[_LATENT_CHANNELS:].fill_(-4.0)


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


def fit_tiny_vae(
    vae: AutoencoderKLCogVideoX,
    frames_NTHWC: np.ndarray,
    *,
    steps: int,
    seed: int,
    task: Task,
) -> None:
    """Train the VAE on clips, in place, and set its scaling factor to 1 / std of the latents.

    Trains on single frames first, then on short clips, with absolute plus squared error and a small
    KL term, AdamW and a one-cycle cosine schedule. The same arguments and number of threads give
    the same weights.

    Args:
        vae: From `build_tiny_vae`; left in evaluation mode.
        frames_NTHWC: uint8 [N, T, H, W, 3].
        steps: Optimizer steps.
        seed: Random seed of crops and noise.
        task: Advanced by one per step; shows the error.
    """
    vae.train()
    weights = list(vae.parameters())
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    noise = torch.Generator().manual_seed(seed)
    for pixels_BCTHW in _batches(frames_NTHWC, steps=steps, seed=seed):
        posterior = vae.encode(pixels_BCTHW).latent_dist
        restored_BCTHW = vae.decode(posterior.sample(noise)).sample
        error_BCTHW = restored_BCTHW - pixels_BCTHW
        absolute = error_BCTHW.abs().mean()
        divergence = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        loss = absolute + _SQUARED_ERROR_WEIGHT * (error_BCTHW**2).mean() + _KL_WEIGHT * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        task.advance()
        task.note(f"error {absolute.item():.3f}")
    vae.eval()
    vae.register_to_config(scaling_factor=1 / _latent_std(vae, frames_NTHWC))


def _batches(frames_NTHWC: np.ndarray, *, steps: int, seed: int) -> Iterator[torch.Tensor]:
    random = np.random.default_rng(seed)
    for step in range(steps):
        image = step < _IMAGE_FRACTION * steps or frames_NTHWC.shape[1] < _CROP_FRAMES
        num_frames, batch_size = (1, _IMAGE_BATCH) if image else (_CROP_FRAMES, _CLIP_BATCH)
        crops = [_vivid_crop(random, frames_NTHWC, num_frames) for _ in range(batch_size)]
        yield _pixels(np.stack(crops))


def _vivid_crop(random: np.random.Generator, frames_NTHWC: np.ndarray, frames: int) -> np.ndarray:
    """The most saturated of three random crops, since figures fill little of a frame."""
    num_clips, num_frames, height, width, _ = frames_NTHWC.shape
    tall, wide = min(_CROP, height), min(_CROP, width)

    def crop() -> np.ndarray:
        clip = random.integers(num_clips)
        time = random.integers(num_frames - frames + 1)
        top, left = random.integers(height - tall + 1), random.integers(width - wide + 1)
        return frames_NTHWC[clip, time : time + frames, top : top + tall, left : left + wide]

    def vividness(crop_THWC: np.ndarray) -> float:
        return float(np.ptp(crop_THWC[0], axis=-1).mean())

    return max((crop() for _ in range(3)), key=vividness)


def _pixels(frames_NTHWC: np.ndarray) -> torch.Tensor:
    """uint8 [N, T, H, W, 3] -> float32 [N, 3, T, H, W] in -1..1."""
    return torch.from_numpy(frames_NTHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def _latent_std(vae: AutoencoderKLCogVideoX, frames_NTHWC: np.ndarray) -> float:
    """Standard deviation of posterior samples over the first frames of a few clips."""
    frames = min(2 * _CROP_FRAMES - 1, frames_NTHWC.shape[1])
    posterior = vae.encode(_pixels(frames_NTHWC[:4, :frames])).latent_dist
    return float((posterior.mean.var() + posterior.var.mean()).sqrt())
