"""Sizes of the comparison: how many clips, steps, seeds and videos."""

from dataclasses import dataclass

from stages.demo.training.drawn_clips import HEIGHT, WIDTH
from tests.benchmarks.evidence.arms import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModels:
    """Models to train before the comparison, by the scripts of `stages/demo/training`."""

    image_size: int
    """Side of the tracker's input, pixels."""
    vae_steps: int
    transformer_steps: int
    tracker_steps: int
    clips: int
    """Clips that the transformer is trained on."""
    held_out_clips: int
    """Clips that the models are scored on."""
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Lengths and counts of one size; `arms.py` says what is compared."""

    train_clips: int
    """Clips to train on."""
    validation_clips: int
    """Clips of the training set that are held out for the diffusion loss."""
    test_clips: int
    """Clips whose first frames are continued and scored; no arm or setting is chosen by them."""
    tuning_clips: int
    """Clips on which each arm's weight is chosen."""
    steps: int
    """Training steps of every fine-tuning run."""
    tuning_weights: tuple[float, ...]
    """Weights of the auxiliary loss that each arm may choose from; one means no tuning."""
    seeds: tuple[int, ...]
    """Training seeds of the main comparison, and of the controls."""
    few_seeds: tuple[int, ...]
    """Training seeds of the other groups."""
    full_clips: int
    """Clips of the runs that train all weights of the base model."""
    full_steps: int | None
    """Their steps; None skips these runs."""
    scratch_steps: tuple[int, ...]
    """Steps after which a run from random weights is scored; none skips these runs."""
    denoising_steps: int
    height: int = HEIGHT
    """Of the clips, pixels."""
    width: int = WIDTH
    models: BaseModels | None = None
    """None: the packaged models, which know clips of 128x192 pixels only."""
    arms: tuple[str, ...] | None = None
    """Names of the arms to run; None is all."""
    overrides: tuple[str, ...] = ()
    """Settings that differ from config.yaml."""

    def steps_of(self, group: Group) -> tuple[int, ...]:
        """Training steps after which a group's runs are scored; none if it is skipped."""
        if group == "scratch":
            return self.scratch_steps
        if group == "full":
            return () if self.full_steps is None else (self.full_steps,)
        return (self.steps,)


SIZES = {
    "smoke": Size(
        train_clips=6,
        validation_clips=1,
        test_clips=2,
        tuning_clips=1,
        steps=2,
        tuning_weights=(0.5,),
        seeds=(0,),
        few_seeds=(0,),
        full_clips=0,
        full_steps=None,
        scratch_steps=(),
        denoising_steps=2,
        arms=("none", "lgf"),
    ),
    "default": Size(
        train_clips=96,
        validation_clips=8,
        test_clips=24,
        tuning_clips=12,
        steps=300,
        tuning_weights=(0.1, 0.5, 2.0),
        seeds=(0, 1, 2),
        few_seeds=(0,),
        full_clips=480,
        full_steps=1500,
        scratch_steps=(500, 1000, 2000),
        denoising_steps=20,
    ),
    "gpu": Size(
        train_clips=1000,
        validation_clips=32,
        test_clips=96,
        tuning_clips=24,
        steps=2000,
        tuning_weights=(0.1, 0.5, 2.0),
        seeds=(0, 1, 2),
        few_seeds=(0, 1, 2),
        full_clips=1000,
        full_steps=10_000,
        scratch_steps=(5000, 10_000, 20_000),
        denoising_steps=50,
        # Limbs are one to two tokens wide, against half a token of the packaged models.
        height=256,
        width=384,
        models=BaseModels(
            image_size=256,
            vae_steps=6000,
            transformer_steps=30_000,
            tracker_steps=2000,
            clips=10_000,
            held_out_clips=24,
            device="cuda",
        ),
        overrides=(
            "extract.device=cuda",
            "train.batch_size=32",
            "train.micro_batch_size=32",
            "train.deepspeed.precision=bf16",
        ),
    ),
}
