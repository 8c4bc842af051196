"""Trains the demo's base model, like the one packaged in `pretrained/`.

    python -m stages.demo.pretraining OUT

It plays the part of an official CogVideoX: a VAE fitted to the demo's drawings, and a text-to-video
transformer overfitted to the demo's own 24 clips. It tests that the pipeline works and says nothing
about quality. Takes about 40 minutes on one core.
"""

# Legend: N clip, B batch, T frame, F latent frame, C channel, H W pixels or latent grid.

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from torch import Tensor, nn

from cache_schema.checksummed_json import parse_json
from stages.cogvideox.diffusion import cumulative_alphas, diffusion_loss, noisy_latents
from stages.demo.build import DemoConfig
from stages.demo.scenes import draw_clip
from stages.demo.tiny_cogvideox import MAX_TEXT_TOKENS, build_tiny_cogvideox, build_tiny_vae
from stages.files.tensor_files import umask_modes
from stages.progress import Task

_NUM_FRAMES, _HEIGHT, _WIDTH, _FPS = 17, 128, 192, 8.0
_VAE_SEEDS = range(100, 172)
"""Seeds of additional clips for the VAE."""
_BATCH = 4
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 100
_EMA_DECAY = 0.998
"""Decay of the EMA of the weights; the EMA is saved."""

_CROP = 64
_CROP_FRAMES = 9
"""One latent frame for the first frame and two more: the shortest clip that exercises every
temporal path."""
_IMAGE_FRACTION = 0.7
"""Fraction of the steps, at the start, that train on single frames; they cost a ninth and suffice
to learn colours."""
_IMAGE_BATCH, _CLIP_BATCH = 4, 2
_VAE_LEARNING_RATE = 5e-3
_KL_WEIGHT = 1e-4
_SQUARED_ERROR_WEIGHT = 2.0
"""Weight of the squared error relative to the absolute one; emphasises small bright limbs."""


def pretrain(out: Path, *, vae_steps: int, minutes: float, log: Callable[[str], None]) -> None:
    """Write the pipeline folder, weights in float16.

    Args:
        out: Output folder.
        vae_steps: Training steps of the VAE.
        minutes: Training time of the transformer; its learning rate decays to nearly zero.
        log: Called with a progress line from time to time.
    """
    config = DemoConfig()
    clips = [_draw(seed) for seed in range(config.num_clips)]
    captions = [clip.caption for clip in clips]
    frames_NTHWC = np.stack([clip.frames_THWC for clip in clips])
    more_NTHWC = np.stack([_draw(seed).frames_THWC for seed in _VAE_SEEDS])
    vae = build_tiny_vae(config.seed)
    fit_tiny_vae(
        vae,
        np.concatenate([frames_NTHWC, more_NTHWC]),
        steps=vae_steps,
        seed=config.seed,
        task=_LoggedTask("VAE", log),
    )
    build_tiny_cogvideox(
        out,
        height=_HEIGHT,
        width=_WIDTH,
        num_frames=_NUM_FRAMES,
        captions=captions,
        seed=config.seed,
        vae=vae,
    )
    pipeline = CogVideoXPipeline.from_pretrained(out)
    pipeline.transformer = _train(pipeline, frames_NTHWC, captions, minutes * 60, config.seed, log)
    with umask_modes(out):
        pipeline.to(torch.float16).save_pretrained(out)
    for file in out.rglob("*.json"):  # diffusers records the path each part was loaded from
        content = parse_json(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _draw(seed: int) -> Any:
    return draw_clip(seed, num_frames=_NUM_FRAMES, height=_HEIGHT, width=_WIDTH, fps=_FPS)


def _train(
    pipeline: Any,
    frames_NTHWC: np.ndarray,
    captions: list[str],
    seconds: float,
    seed: int,
    log: Callable[[str], None],
) -> nn.Module:
    """Train the transformer with the diffusion loss; returns the EMA of its weights."""
    mean_NFCHW, std_NFCHW = _latents(pipeline.vae, frames_NTHWC)
    with torch.no_grad():
        text_NLD = torch.cat(
            [
                pipeline.encode_prompt(
                    caption,
                    do_classifier_free_guidance=False,
                    max_sequence_length=MAX_TEXT_TOKENS,
                )[0]
                for caption in captions
            ]
        )
    positions = pipeline._prepare_rotary_positional_embeddings(
        _HEIGHT, _WIDTH, mean_NFCHW.shape[1], "cpu"
    )
    abar_S = cumulative_alphas(pipeline.scheduler.config).float()
    student = pipeline.transformer.train()
    ema = copy.deepcopy(student).eval()
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    random = torch.Generator().manual_seed(seed)
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / seconds) < 1:
        rate = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = rate * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        index_B = torch.randint(len(captions), (_BATCH,), generator=random)
        timestep_B = torch.randint(len(abar_S), (_BATCH,), generator=random)
        clean, noise = (torch.randn(mean_NFCHW[index_B].shape, generator=random) for _ in range(2))
        clean = mean_NFCHW[index_B] + std_NFCHW[index_B] * clean
        predicted = student(
            hidden_states=noisy_latents(clean, noise, abar_S[timestep_B]),
            encoder_hidden_states=text_NLD[index_B],
            timestep=timestep_B,
            image_rotary_emb=positions,
            return_dict=False,
        )[0]
        loss = diffusion_loss(predicted, clean, noise, abar_S[timestep_B]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(ema.parameters(), student.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        if step % 200 == 0:
            log(f"transformer: step {step}, {progress:.0%}, loss {loss.item():.3f}")
    return ema


@torch.no_grad()
def _latents(vae: Any, frames_NTHWC: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scaled posterior mean and standard deviation, [N, F, C, H, W] each."""
    posteriors = [
        vae.encode(batch_BCTHW).latent_dist for batch_BCTHW in _pixels(frames_NTHWC).split(2)
    ]
    mean, std = (
        torch.cat([getattr(posterior, name) for posterior in posteriors]).transpose(1, 2)
        for name in ("mean", "std")
    )
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


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
    optimizer = torch.optim.AdamW(
        weights, lr=_VAE_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        _VAE_LEARNING_RATE,
        total_steps=max(steps, 2),
        pct_start=0.1,
        cycle_momentum=False,
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


class _LoggedTask:
    """A task that logs every hundredth step."""

    def __init__(self, what: str, log: Callable[[str], None]) -> None:
        self._what, self._log, self._done = what, log, 0

    def advance(self, amount: int = 1) -> None:
        self._done += amount

    def expect(self, total: int) -> None:
        """Ignored; the total is not logged."""

    def note(self, text: str) -> None:
        if self._done % 100 == 0:
            self._log(f"{self._what}: step {self._done}, {text}")


def main(
    out: Path,
    vae_steps: Annotated[int, typer.Option(min=1)] = 900,
    minutes: Annotated[float, typer.Option(min=0.01)] = 33.0,
) -> None:
    """Train a base model for the demo and write it to OUT."""
    torch.set_num_threads(1)  # for models this small, threads cost more than they gain
    pretrain(out, vae_steps=vae_steps, minutes=minutes, log=print)


if __name__ == "__main__":
    typer.run(main)
