"""Puts a run's validation together; `train` asks."""

from collections.abc import Callable

from torch import Tensor

from stages.train_student.logs.boards import Boards
from stages.train_student.run import Run
from stages.train_student.student import Student
from stages.train_student.validation.held_out_losses import HeldOutLosses
from stages.train_student.validation.prompts import encode_prompts
from stages.train_student.validation.samples import FOLDER, NEGATIVE_PROMPT, TrainingSamples
from stages.train_student.validation.validation import Validation


def embed_prompts(run: Run) -> dict[str, Tensor]:
    """What the samples need of the text encoder, before the model that is trained is loaded.

    Every rank must call this; rank 0 encodes, unless an earlier start did.
    """
    config = run.config.samples
    if not config.prompts:
        return {}
    negative = (NEGATIVE_PROMPT,) if config.guidance > 1.0 else ()
    return encode_prompts(
        tuple(dict.fromkeys((*config.prompts, *negative))),
        run.model,
        length=run.facts.transformer["max_text_seq_length"],
        dtype=run.dtype,
        kept=run.config.run_dir / FOLDER / "prompts.safetensors",
        world=run.world,
        progress=run.progress,
    )


def build_validation(
    run: Run,
    student: Student,
    embeds: dict[str, Tensor],
    *,
    boards: Boards | None,
    note: Callable[[str], None],
) -> Validation:
    """What looks at the student between the steps.

    Args:
        student: the module inside the engine.
        embeds: those of `embed_prompts`.
        boards: on rank 0.
        note: shows a few words beside the bar of the steps.
    """
    config, losses, samples = run.config, None, None
    if run.stores.held_out:
        losses = HeldOutLosses(
            run.samples,
            run.training_step(),
            timesteps=config.validation.timesteps,
            objectives=config.objectives,
            world=run.world,
        )
    if config.samples.prompts:
        samples = TrainingSamples(
            config.samples,
            config.run_dir,
            run.model,
            run.clips.sizes[0],
            embeds,
            dtype=run.dtype,
            world=run.world,
        )
    return Validation(
        student,
        config,
        losses=losses,
        samples=samples,
        boards=boards,
        check=run.lock.check,
        world=run.world,
        progress=run.progress,
        note=note,
    )
