"""Trains the demo's tiny SAM2 to follow drawn figures.

    python -m stages.demo.training.sam2 OUT [--image-size 256 --device cuda]

OUT receives what is packaged in `stages/demo/pretrained/sam2`:

    tiny.yaml           configuration
    tiny.safetensors    weights, float16
    training.json       steps, seed, versions, and scores on clips that it was not trained on

and `training.pt`, from which a stopped run goes on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from stages.demo.tiny_sam2 import IMAGE_SIZE, build_tiny_sam2, write_tiny_config
from stages.demo.training.figure_tracks import Absence, draw_tracks
from stages.demo.training.held_out import held_out_scores
from stages.demo.training.run import TrainingRun, cosine_schedule, progress_bar, write_record
from stages.demo.training.track_loss import track_loss
from stages.files.tensor_files import save_tensors
from stages.progress import Task
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.tracker import Tracker

_BATCH = 8
_WEIGHT_DECAY = 0.01
_BETAS = (0.9, 0.999)
_WARMUP_STEPS = 100
_SHARPNESS = 2.0
"""Factor by which the mask logits are scaled after training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Phase:
    """A part of the run; its learning rate decays to nearly zero."""

    share: float
    """Fraction of the run's steps."""
    learning_rate: float
    lengths: tuple[tuple[float, int], ...]
    """Frames per example, each until a fraction of the phase: longer clips as it learns."""
    second_figure: float
    """Fraction of examples with a second figure."""
    absence: Absence
    """How the subject becomes absent."""
    absent: float
    """Fraction of the other examples in which it does."""
    degraded: float
    """Fraction of examples that are blurred and fade in places."""


_PHASES = (
    _Phase(
        share=0.7,
        learning_rate=1.5e-3,
        lengths=((0.35, 2), (0.85, 5), (1.0, 9)),
        second_figure=0.6,
        absence="cut",
        absent=0.15,
        degraded=0.0,
    ),
    # Of the first phase's cuts it learns nothing about absence.
    _Phase(
        share=0.3,
        learning_rate=1e-3,
        lengths=((0.75, 5), (1.0, 9)),
        second_figure=0.5,
        absence="gone",
        absent=0.5,
        degraded=0.4,
    ),
)


def train_steps(model: Any, run: TrainingRun, *, seed: int, task: Task) -> None:
    """Train from the run's step to its last one, with checkpoints.

    The model is in evaluation mode except for its mask decoder: no dropout, prompted masks are
    binarised as when tracking, and the mask decoder returns the tokens that it was asked for.

    Args:
        model: The tiny SAM2.
        run: Steps, optimizer and checkpoints.
        seed: Seed of the examples; those of a step depend on nothing else.
        task: Advanced by one per step; shows the loss and the IoU.
    """
    model.eval().requires_grad_(True)
    decoder: Any = model.sam_mask_decoder
    decoder.train()
    for step in run.remaining_steps():
        phase, step_of_phase, steps_of_phase = _phase_of(step, run.steps)
        progress = step_of_phase / steps_of_phase
        num_frames = next(length for until, length in phase.lengths if progress < until)
        tracks = draw_tracks(
            step,
            seed=seed,
            batch_size=_BATCH,
            num_frames=num_frames,
            side=model.image_size,
            second_figure=phase.second_figure,
            absence=phase.absence,
            absent=phase.absent,
            degraded=phase.degraded,
        )
        loss, iou = track_loss(model, tracks, np.random.default_rng((seed, step, 1)))
        schedule = cosine_schedule(step_of_phase, steps_of_phase, warmup_steps=_WARMUP_STEPS)
        run.update(loss, rate=phase.learning_rate * schedule)
        task.advance()
        task.note(f"loss {loss.item():.3f}, IoU {iou:.3f}, {num_frames} frames")


def _phase_of(step: int, steps: int) -> tuple[_Phase, int, int]:
    """Phase of a step, number of the step in it, and number of its steps."""
    first = round(_PHASES[0].share * steps)
    if step < first:
        return _PHASES[0], step, first
    return _PHASES[1], step - first, steps - first


@torch.no_grad()
def _sharpen(model: Any) -> None:
    """Scale the mask logits, which changes no mask.

    A figure of 128 pixels is mostly border, where short training leaves logits near zero; automatic
    prompts take such masks for unstable.
    """
    for network in model.sam_mask_decoder.output_hypernetworks_mlps:
        for parameter in network.layers[-1].parameters():
            parameter.mul_(_SHARPNESS)


def train(
    out: Path,
    *,
    steps: int,
    seed: int,
    held_out_clips: int,
    image_size: int = IMAGE_SIZE,
    device: str = "cpu",
) -> None:
    """Train the tiny SAM2, or finish a stopped run.

    Args:
        out: Output folder; created if missing.
        steps: Training steps.
        seed: Random seed of the weights and of the examples.
        held_out_clips: Clips on which the result is scored.
        image_size: Side of SAM2's square input, pixels; a multiple of 32.
        device: Where the model is trained.

    Raises:
        ValueError: `out` has a run with other settings, or the loss is NaN or infinite.
    """
    out.mkdir(parents=True, exist_ok=True)
    config, checkpoint = out / "tiny.yaml", out / "tiny.safetensors"
    write_tiny_config(config, image_size)
    model = build_tiny_sam2(config, seed).to(device).requires_grad_(True)
    run = TrainingRun(
        out,
        {"sam2": model},
        steps=steps,
        recipe={"seed": seed, "image_size": image_size},
        weight_decay=_WEIGHT_DECAY,
        betas=_BETAS,
    )
    with progress_bar("SAM2", steps, completed=run.done) as task:
        train_steps(model, run, seed=seed, task=task)
    _sharpen(model)
    weights = {name: value.half().cpu() for name, value in model.state_dict().items()}
    save_tensors(weights, checkpoint)
    tracker = Tracker(build_sam2(config, checkpoint), precision="fp32")
    scores = held_out_scores(tracker, num_clips=held_out_clips)
    write_record(
        out / "training.json", steps=steps, seed=seed, image_size=image_size, held_out=scores
    )


def main(
    out: Path,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    image_size: Annotated[int, typer.Option(min=64)] = IMAGE_SIZE,
    device: str = "cpu",
) -> None:
    """Train a SAM2 for the demo and write it to OUT; half an hour on one core."""
    torch.set_num_threads(1)  # for models this small, threads cost more than they gain
    train(out, steps=steps, seed=seed, held_out_clips=24, image_size=image_size, device=device)


if __name__ == "__main__":
    typer.run(main)
