"""Trains the demo's VAE on drawn clips.

    python -m stages.demo.training.vae OUT [--height 256 --width 384 --device cuda]

OUT receives a diffusers folder, weights in float16, `training.json` (steps, seed, versions, and the
PSNR on clips that it was not trained on), and `training.pt`, from which a stopped run goes on.
"""

# Legend: B crop, N clip, T frame, C channel, H W pixels.

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from stages.demo.scenes import FigureClip
from stages.demo.tiny_cogvideox import build_tiny_vae
from stages.demo.training.drawn_clips import (
    HEIGHT,
    HELD_OUT_SEEDS,
    WIDTH,
    draw_demo_clip,
    training_seed,
)
from stages.demo.training.run import (
    TrainingRun,
    cosine_schedule,
    drop_load_paths,
    progress_bar,
    write_record,
)
from stages.files.tensor_files import umask_modes
from stages.progress import Task

WIDTHS, LATENT_CHANNELS, NORM_GROUPS = (16, 32, 48, 64), 16, 8
FPS = 16.0
"""At 8 frames per second, four frames show too different poses for one latent frame."""

_POOL = 200
"""Clips from which the crops of a step are taken."""
_STEPS_PER_CLIP = 20
"""Steps after which a clip of the pool is replaced."""
_CROP = 64
_CROP_FRAMES = 9
"""One latent frame for the first frame and two more: the shortest clip that exercises every
temporal path."""
_IMAGE_FRACTION = 0.3
"""Fraction of the steps, at the start, of which three in four train on single frames; they cost a
ninth and suffice to learn colours."""
_IMAGE_BATCH, _CLIP_BATCH = 8, 2
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 50
_KL_WEIGHT = 1e-4
_SQUARED_ERROR_WEIGHT = 2.0
"""Weight of the squared error relative to the absolute one; emphasises small bright limbs."""
_SCALE_CLIPS = 4
"""Clips over which the latents' standard deviation is measured."""


def train(
    out: Path,
    *,
    steps: int,
    seed: int,
    held_out_clips: int,
    height: int = HEIGHT,
    width: int = WIDTH,
    device: str = "cpu",
) -> None:
    """Train a VAE, or finish a stopped run.

    Args:
        out: Output folder; created if missing.
        steps: Training steps.
        seed: Random seed of weights, clips, crops and noise.
        held_out_clips: Clips on which the result is scored.
        height: Of the clips, pixels; a multiple of 8.
        width: Of the clips, pixels; a multiple of 8.
        device: Where the VAE is trained.

    Raises:
        ValueError: `out` has a run with other settings, or the loss is NaN or infinite.
    """
    vae = build_tiny_vae(
        seed, widths=WIDTHS, latent_channels=LATENT_CHANNELS, norm_groups=NORM_GROUPS
    ).to(device)
    draw = partial(draw_demo_clip, height=height, width=width)
    run = TrainingRun(
        out,
        {"vae": vae},
        steps=steps,
        recipe={"seed": seed, "height": height, "width": width},
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )
    with progress_bar("VAE", steps, completed=run.done) as task:
        train_steps(vae, run, seed=seed, draw=draw, task=task)
    vae.cpu()
    some_NTHWC = [
        draw(training_seed(i, run_seed=seed), fps=FPS).frames_THWC for i in range(_SCALE_CLIPS)
    ]
    vae.register_to_config(scaling_factor=1 / _latent_std(vae, np.stack(some_NTHWC)))
    vae.half()
    with umask_modes(out):
        vae.save_pretrained(out)
    drop_load_paths(out)
    vae.float()
    psnrs = {
        f"{fps:.0f} fps": round(
            float(
                np.mean(
                    [
                        held_out_psnr(vae, draw(unseen, fps=fps).frames_THWC)
                        for unseen in HELD_OUT_SEEDS[:held_out_clips]
                    ]
                )
            ),
            2,
        )
        for fps in (FPS, FPS / 2)
    }
    write_record(
        out / "training.json",
        steps=steps,
        seed=seed,
        height=height,
        width=width,
        held_out={"psnr_db": psnrs, "clips": held_out_clips},
    )


def train_steps(
    vae: AutoencoderKLCogVideoX,
    run: TrainingRun,
    *,
    seed: int,
    draw: Callable[..., FigureClip],
    task: Task,
) -> None:
    """Train from the run's step to its last one, with checkpoints; then in evaluation mode.

    Absolute plus squared error and a small KL term. A step depends on its number, the seed and the
    weights alone.

    Args:
        vae: From `build_tiny_vae`.
        run: Steps, optimizer and checkpoints.
        seed: Seed of clips, crops and noise.
        draw: `draw_demo_clip`, of some size.
        task: Advanced by one per step; shows the error.
    """
    vae.train()
    device = vae.device
    pool: dict[int, np.ndarray] = {}
    for step in run.remaining_steps():
        random = np.random.default_rng((seed, step))
        pixels_BCTHW = _batch(random, step, step / run.steps, seed, draw, pool).to(device)
        noise = torch.Generator().manual_seed(int(random.integers(2**31)))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels_BCTHW).latent_dist
            restored_BCTHW = vae.decode(posterior.sample(noise)).sample
        error_BCTHW = restored_BCTHW.float() - pixels_BCTHW
        absolute = error_BCTHW.abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
        loss = absolute + _SQUARED_ERROR_WEIGHT * (error_BCTHW**2).mean() + _KL_WEIGHT * divergence
        run.update(
            loss,
            rate=_LEARNING_RATE * cosine_schedule(step, run.steps, warmup_steps=_WARMUP_STEPS),
        )
        task.advance()
        task.note(f"error {absolute.item():.3f}")
    vae.eval()


def _batch(
    random: np.random.Generator,
    step: int,
    progress: float,
    seed: int,
    draw: Callable[..., FigureClip],
    pool: dict[int, np.ndarray],
) -> Tensor:
    """Crops of the step's clips; `pool` keeps the clips of the last steps by index."""
    image = progress < _IMAGE_FRACTION and step % 4 > 0
    num_frames, batch_size = (1, _IMAGE_BATCH) if image else (_CROP_FRAMES, _CLIP_BATCH)
    first = step // _STEPS_PER_CLIP
    for index in [index for index in pool if index < first]:
        del pool[index]
    crops = []
    for _ in range(batch_size):
        index = first + int(random.integers(_POOL))
        if index not in pool:
            clip_seed = training_seed(index, run_seed=seed)
            pool[index] = draw(clip_seed, fps=FPS).frames_THWC
        crops.append(_vivid_crop(random, pool[index], num_frames))
    return as_pixels(np.stack(crops))


def _vivid_crop(random: np.random.Generator, frames_THWC: np.ndarray, length: int) -> np.ndarray:
    """The most saturated of three random crops, since figures fill little of a frame."""
    num_frames, height, width, _ = frames_THWC.shape

    def crop() -> np.ndarray:
        time = random.integers(num_frames - length + 1)
        top, left = random.integers(height - _CROP + 1), random.integers(width - _CROP + 1)
        return frames_THWC[time : time + length, top : top + _CROP, left : left + _CROP]

    def vividness(crop_THWC: np.ndarray) -> float:
        return float(np.ptp(crop_THWC[0], axis=-1).mean())

    return max((crop() for _ in range(3)), key=vividness)


def as_pixels(frames_NTHWC: np.ndarray) -> Tensor:
    """uint8 [N, T, H, W, C] -> float32 [N, C, T, H, W] in -1..1."""
    return torch.from_numpy(frames_NTHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def _latent_std(vae: AutoencoderKLCogVideoX, frames_NTHWC: np.ndarray) -> float:
    """Standard deviation of posterior samples."""
    posterior = vae.encode(as_pixels(frames_NTHWC)).latent_dist
    return float((posterior.mean.var() + posterior.var.mean()).sqrt())


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLCogVideoX, frames_THWC: np.ndarray) -> float:
    """PSNR in dB of a clip, encoded to the posterior's mean and decoded."""
    pixels_1CTHW = as_pixels(frames_THWC[None])
    restored_1CTHW = vae.decode(vae.encode(pixels_1CTHW).latent_dist.mode()).sample.clamp(-1, 1)
    # Pixels span 2, from -1 to 1.
    return float(10 * torch.log10(4 / (restored_1CTHW - pixels_1CTHW).square().mean()))


def main(
    out: Path,
    steps: Annotated[int, typer.Option(min=1)] = 6000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    height: Annotated[int, typer.Option(min=64)] = HEIGHT,
    width: Annotated[int, typer.Option(min=64)] = WIDTH,
    device: str = "cpu",
) -> None:
    """Train a VAE for the demo and write it to OUT."""
    torch.set_num_threads(threads)
    train(
        out,
        steps=steps,
        seed=seed,
        held_out_clips=24,
        height=height,
        width=width,
        device=device,
    )


if __name__ == "__main__":
    typer.run(main)
