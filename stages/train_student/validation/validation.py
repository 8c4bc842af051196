"""Held-out losses and samples during training: when they are due, and building what they need.

Both are also done before the first step, as the baseline for everything after it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from stages.progress import Progress
from stages.train_student.config import TrainConfig
from stages.train_student.logging.rows import RowFile, ValidationRow, read_rows
from stages.train_student.logging.trackers import Boards
from stages.train_student.model.student import Student
from stages.train_student.parallel.process_group import World, on_first_rank
from stages.train_student.report import write_report
from stages.train_student.report.records import VALIDATION_FILE
from stages.train_student.setup import Run
from stages.train_student.validation.held_out import HeldOutLosses
from stages.train_student.validation.samples import FOLDER, NEGATIVE_PROMPT, TrainingSamples
from stages.train_student.validation.text import encode_prompts

PAGE_SHARE = 0.01
"""Of a run's time, at most spent on its page while it goes on: all steps are read each time."""


class Validation:
    """Validates and draws when it is time, in every process alike."""

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        *,
        losses: HeldOutLosses | None,
        samples: TrainingSamples | None,
        boards: Boards | None,
        check: Callable[[], None],
        world: World,
        progress: Progress,
        note: Callable[[str], None],
    ) -> None:
        """Get ready.

        Args:
            losses: None where no clip is held out.
            samples: None where nothing is drawn.
            boards: on rank 0.
            check: called on rank 0 before a file is changed; raises if the run's folder may be
                another process's.
            note: shows a few words beside the bar of the steps.
        """
        self._student = student
        self._config = config
        self._losses = losses
        self._samples = samples
        self._boards = boards
        self._check = check
        self._world = world
        self._progress = progress
        self._note = note
        self._last: ValidationRow | None = None
        self._page_due = -math.inf
        """By `time.monotonic`; on rank 0."""

    def start(self, done: int) -> None:
        """Drop what an interrupted run made after `done` steps, and make what it still owes."""

        def clear() -> tuple[bool, bool]:
            self._check()
            file = self._run_dir / VALIDATION_FILE
            if self._losses is not None:
                RowFile(file, done, self._check).close()
            if self._samples is not None:
                self._samples.drop_after(done)
            validated = {row["step"] for row in read_rows(file)}
            return done in validated, self._samples is not None and self._samples.drawn(done)

        validated, drawn = on_first_rank(self._world, clear)
        self._look(done, losses=not validated, samples=not drawn)

    def after_step(self, step: int) -> None:
        """Look at the student if it is time to; every rank calls this after each step."""
        self._look(step, losses=True, samples=True)

    def write_page(self, *, only_when_due: bool = False) -> None:
        """Make the run's page anew, on rank 0; every rank must call this.

        Args:
            only_when_due: leave the page as it is where making it would take more than
                `PAGE_SHARE` of the time since it was last made.
        """

        def write() -> None:
            started = time.monotonic()
            if only_when_due and started < self._page_due:
                return
            try:
                write_report(self._run_dir)
            except Exception as error:  # the page can be made at any time, the steps not
                self._progress.log(f"warning: the run's page could not be made: {error!r}")
            ended = time.monotonic()
            self._page_due = ended + (ended - started) / PAGE_SHARE

        on_first_rank(self._world, write)

    def _look(self, step: int, *, losses: bool, samples: bool) -> None:
        """Whether each is still to do; either is done only when it is its time."""
        config, last = self._config, step == self._config.steps
        looked = False
        if losses and self._losses and (last or step % config.validation.every == 0):
            self._validate(self._losses, step)
            looked = True
        if samples and self._samples and (last or step % config.samples.every == 0):
            self._draw(self._samples, step)
            looked = True
        if looked:
            self.write_page(only_when_due=True)

    def _validate(self, losses: HeldOutLosses, step: int) -> None:
        row, damaged = losses(self._student, step, self._note)
        if not self._world.is_first:
            return
        for clip in damaged:
            self._progress.log(
                f"warning: held-out clip {clip.key!r} cannot be read, and is missing from the "
                f"validation: {clip.message}"
            )
        file = RowFile(self._run_dir / VALIDATION_FILE, step, self._check)
        file.add(asdict(row))
        file.sync()
        file.close()
        values = {"diffusion": row.diffusion, **row.auxiliary}
        if self._boards is not None:
            curves = {f"validation/{n}": v for n, v in values.items() if v is not None}
            self._boards.add_scalars(step, curves)
        self._progress.log(_told(row, self._last))
        self._last = row

    def _draw(self, samples: TrainingSamples, step: int) -> None:
        videos, spoiled = samples(self._student, step, self._note)
        if not self._world.is_first:
            return
        for number, (video, prompt) in enumerate(
            zip(videos, self._config.samples.prompts, strict=True)
        ):
            if self._boards is not None:
                self._boards.add_video(step, f"samples/{number}", video, prompt)
        warning = f"; {spoiled:.0%} of one is no number, and black" if spoiled else ""
        self._progress.log(f"step {step}, drawn: {_paths(videos)}{warning}")

    @property
    def _run_dir(self) -> Path:
        return self._config.run_dir


def _told(row: ValidationRow, before: ValidationRow | None) -> str:
    values = {"diffusion": row.diffusion, **row.auxiliary}
    older = {} if before is None else {"diffusion": before.diffusion, **before.auxiliary}
    told = []
    for name, value in values.items():
        shown = math.nan if value is None else value
        change = older.get(name)
        told.append(f"{name} {shown:.4f}" + (f" ({shown - change:+.4f})" if change else ""))
    return f"step {row.step}, {row.clips} held-out clips: {', '.join(told)}"


def _paths(videos: list[Path]) -> str:
    return str(videos[0]) if len(videos) == 1 else f"{len(videos)} videos in {videos[0].parent}"


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
