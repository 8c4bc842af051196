"""Trains the demo's base model, a text- or image-to-video transformer, on drawn clips.

    python -m stages.demo.training.vae VAE
    python -m stages.demo.training.transformer OUT --vae VAE [--image-to-video]
                                               [--height 256 --width 384 --device cuda]

OUT receives a diffusers pipeline folder, weights in float16, `training.json` (steps, seed,
versions, and the loss on clips that it was not trained on), and `training.pt`, from which a stopped
run goes on. Encoded clips are kept in VAE, for both kinds of transformer.
"""

# Legend: N clip, B clip of a batch, T frame, F latent frame, C channel, H W latent grid, L token,
# D text channel, S timestep.

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline
from torch import Tensor, nn

from stages.demo.tiny_cogvideox import MAX_TEXT_TOKENS, build_tiny_cogvideox
from stages.demo.training.drawn_clips import (
    HEIGHT,
    HELD_OUT_SEEDS,
    NUM_FRAMES,
    WIDTH,
    training_seed,
)
from stages.demo.training.encoded_clips import ClipEncoder, EncodedClips
from stages.demo.training.run import (
    TrainingRun,
    cosine_schedule,
    drop_load_paths,
    progress_bar,
    write_record,
)
from stages.files.tensor_files import umask_modes
from stages.progress import Task
from stages.students.cogvideox.diffusion import cumulative_alphas, noisy_latents, velocity
from stages.students.cogvideox.inputs import image_condition

LAYERS, HEADS, HEAD_WIDTH = 6, 3, 64
_BATCH = 4
_LEARNING_RATE = 1e-3
_WARMUP_STEPS = 100
_EMA_DECAY = 0.998
"""Decay of the EMA of the weights; the EMA is saved."""
_EMPTY_CAPTIONS = 0.1
"""Fraction of the clips without their caption, so that guidance can be used."""
_FIGURE_WEIGHT = 5.0
"""Weight of the latents at and beside the figure; textures, which cannot be predicted, otherwise
take most of the loss."""
_FIGURE_WEIGHT_FROM = 0.22
"""Fraction of the steps after which figures have this weight; before, all latents weigh 1."""
_HELD_OUT_TIMESTEPS = (100, 300, 500, 700, 900)


def train(
    out: Path,
    vae_folder: Path,
    *,
    image_to_video: bool,
    num_clips: int,
    steps: int,
    seed: int,
    held_out_clips: int,
    height: int = HEIGHT,
    width: int = WIDTH,
    device: str = "cpu",
) -> None:
    """Train a pipeline's transformer, or finish a stopped run.

    Args:
        out: Output folder; created if missing.
        vae_folder: A VAE from `stages.demo.training.vae`.
        image_to_video: Train an image-to-video transformer.
        num_clips: Clips to train on.
        steps: Training steps.
        seed: Random seed of weights, clips, timesteps and noise.
        held_out_clips: Clips on which the loss is measured.
        height: Of the clips, pixels; a multiple of 16.
        width: Of the clips, pixels; a multiple of 16.
        device: Where the models are trained.

    Raises:
        ValueError: `out` has a run with other settings, or the loss is NaN or infinite.
    """
    vae = AutoencoderKLCogVideoX.from_pretrained(vae_folder, torch_dtype=torch.float32)
    seeds = [training_seed(index, run_seed=seed) for index in range(num_clips)]
    # Started together, one encodes from the first clip on, the other from the last one.
    encoder = ClipEncoder(vae, vae_folder, height=height, width=width, device=device)
    clips, captions = encoder.encoded(seeds, from_end=image_to_video)
    unseen, unseen_captions = encoder.encoded(HELD_OUT_SEEDS[:held_out_clips])
    build_tiny_cogvideox(
        out,
        height=height,
        width=width,
        num_frames=NUM_FRAMES,
        captions=captions,
        seed=seed,
        image_to_video=image_to_video,
        vae=vae,
        num_layers=LAYERS,
        num_heads=HEADS,
        head_width=HEAD_WIDTH,
    )
    pipeline = DiffusionPipeline.from_pretrained(out).to(device)
    student = pipeline.transformer.train()
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    run = TrainingRun(
        out,
        {"transformer": student, "ema": ema},
        steps=steps,
        recipe={
            "seed": seed,
            "num_clips": num_clips,
            "image_to_video": image_to_video,
            "height": height,
            "width": width,
            "vae": encoder.digest([]),
        },
        weight_decay=1e-4,
        betas=(0.9, 0.98),
    )
    model = _Denoiser(pipeline, height=height, width=width)
    with progress_bar("transformer", steps, completed=run.done) as task:
        _train_steps(student, ema, run, model, clips, captions, seed=seed, task=task)
    losses = {
        f"timestep {timestep}": round(
            model.held_out_loss(ema, unseen, unseen_captions, timestep), 4
        )
        for timestep in _HELD_OUT_TIMESTEPS
    }
    pipeline.transformer = ema
    with umask_modes(out):
        pipeline.to("cpu", torch.float16).save_pretrained(out)
    drop_load_paths(out)
    write_record(
        out / "training.json",
        steps=steps,
        seed=seed,
        num_clips=num_clips,
        height=height,
        width=width,
        held_out={"clips": held_out_clips, "loss": losses},
    )


def _train_steps(
    student: nn.Module,
    ema: nn.Module,
    run: TrainingRun,
    model: "_Denoiser",
    clips: EncodedClips,
    captions: Sequence[str],
    *,
    seed: int,
    task: Task,
) -> None:
    """Train from the run's step to its last one; a step's draws depend on seed and number alone."""
    text_NLD, empty_1LD = model.encode(captions), model.encode([""])
    for step in run.remaining_steps():
        random = torch.Generator().manual_seed(seed * run.steps + step)
        index_B = torch.randint(len(captions), (_BATCH,), generator=random)
        timestep_B = torch.randint(len(model.abar_S), (_BATCH,), generator=random)
        no_caption_B = torch.rand(_BATCH, generator=random) < _EMPTY_CAPTIONS
        text_BLD = torch.where(
            no_caption_B.to(text_NLD.device)[:, None, None], empty_1LD, text_NLD[index_B]
        )
        batch = {name: values[index_B].float() for name, values in clips.items()}
        weight = _FIGURE_WEIGHT if step >= _FIGURE_WEIGHT_FROM * run.steps else 1.0
        loss = model.loss(student, batch, text_BLD, timestep_B, random, figure_weight=weight)
        run.update(
            loss.mean(),
            rate=_LEARNING_RATE * cosine_schedule(step, run.steps, warmup_steps=_WARMUP_STEPS),
        )
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(ema.parameters(), student.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        task.advance()
        task.note(f"loss {loss.mean().item():.3f}")


class _Denoiser:
    """What of a pipeline training needs besides the transformer's weights.

    Clips, timesteps and noise are on the CPU, so that they are the same on all devices.
    """

    def __init__(self, pipeline: Any, *, height: int, width: int) -> None:
        self._pipeline = pipeline
        self._device = pipeline.transformer.device
        self._takes_image = (
            pipeline.transformer.config.in_channels > pipeline.vae.config.latent_channels
        )
        num_latents = (NUM_FRAMES - 1) // 4 + 1
        self._positions = pipeline._prepare_rotary_positional_embeddings(
            height, width, num_latents, self._device
        )
        self.abar_S = cumulative_alphas(pipeline.scheduler.config).float()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [N, L, D]."""
        encoded = [
            self._pipeline.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=MAX_TEXT_TOKENS
            )[0]
            for caption in captions
        ]
        return torch.cat(encoded)

    def loss(
        self,
        transformer: nn.Module,
        batch: EncodedClips,
        text_BLD: Tensor,
        timestep_B: Tensor,
        random: torch.Generator,
        *,
        figure_weight: float = 1.0,
    ) -> Tensor:
        """Diffusion loss of each clip, [B]: the mean over latents by weight."""
        mean_BFCHW = batch["mean_NFCHW"]
        clean, noise = (torch.randn(mean_BFCHW.shape, generator=random) for _ in range(2))
        clean = mean_BFCHW + batch["std_NFCHW"] * clean
        abar_B = self.abar_S[timestep_B]
        inputs = noisy_latents(clean, noise, abar_B)
        if self._takes_image:
            condition = [
                image_condition(image_1CHW, clean.shape[1]) for image_1CHW in batch["image_N1CHW"]
            ]
            inputs = torch.cat([inputs, torch.stack(condition)], dim=2)
        with torch.autocast(self._device.type, torch.bfloat16):
            predicted = transformer(
                hidden_states=inputs.to(self._device),
                encoder_hidden_states=text_BLD,
                timestep=timestep_B.to(self._device),
                image_rotary_emb=self._positions,
                return_dict=False,
            )[0]
        weight_BF1HW = 1 + (figure_weight - 1) * batch["figure_NFHW"][:, :, None]
        weight_BF1HW = weight_BF1HW / weight_BF1HW.mean((1, 2, 3, 4), keepdim=True)
        error = predicted.float() - velocity(clean, noise, abar_B).to(self._device)
        return (weight_BF1HW.to(self._device) * error.square()).flatten(1).mean(1)

    @torch.no_grad()
    def held_out_loss(
        self, transformer: nn.Module, clips: EncodedClips, captions: Sequence[str], timestep: int
    ) -> float:
        """Mean loss at a timestep, with fixed noise."""
        random = torch.Generator().manual_seed(timestep)
        batch = {name: values.float() for name, values in clips.items()}
        timestep_B = torch.full((len(captions),), timestep)
        text_BLD = self.encode(captions)
        return self.loss(transformer, batch, text_BLD, timestep_B, random).mean().item()


def main(
    out: Path,
    vae: Annotated[Path, typer.Option(help="folder of a VAE from stages.demo.training.vae")],
    image_to_video: Annotated[bool, typer.Option("--image-to-video")] = False,
    clips: Annotated[int, typer.Option(min=1)] = 3000,
    steps: Annotated[int, typer.Option(min=1)] = 5000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    height: Annotated[int, typer.Option(min=16)] = HEIGHT,
    width: Annotated[int, typer.Option(min=16)] = WIDTH,
    device: str = "cpu",
) -> None:
    """Train a base model for the demo and write its pipeline to OUT."""
    torch.set_num_threads(1)  # for models this small, threads cost more than they gain
    train(
        out,
        vae,
        image_to_video=image_to_video,
        num_clips=clips,
        steps=steps,
        seed=seed,
        held_out_clips=24,
        height=height,
        width=width,
        device=device,
    )


if __name__ == "__main__":
    typer.run(main)
