"""Schedule of held-out losses and sample videos during training, and of the best checkpoint.

Losses and samples are also computed before the first step, as the baseline.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from stages.progress import Progress
from stages.train_student.checkpoints.best import write_best
from stages.train_student.config import TrainConfig
from stages.train_student.logging.rows import RowFile, ValidationRow, iter_rows
from stages.train_student.logging.trackers import Trackers
from stages.train_student.model.student import Student
from stages.train_student.parallel.process_group import World, on_first_rank
from stages.train_student.report import write_report
from stages.train_student.report.records import VALIDATION_FILE, mean_scores
from stages.train_student.setup import Run
from stages.train_student.validation.best import BestKeeper, check_keep_best
from stages.train_student.validation.held_out import HeldOutLosses
from stages.train_student.validation.samples import TrainingSamples
from stages.video_scores.appearance import washed_out

PAGE_SHARE = 0.01
"""Largest fraction of a run's time spent on its report page, which reads all steps each time."""


class Validation:
    """Computes held-out losses and samples when due, and updates the report page."""

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        *,
        losses: HeldOutLosses | None,
        samples: TrainingSamples | None,
        best: BestKeeper | None,
        trackers: Trackers | None,
        check: Callable[[], None],
        world: World,
        progress: Progress,
        note: Callable[[str], None],
    ) -> None:
        """Store the arguments.

        Args:
            losses: None if no clips are held out.
            samples: None if there are no sample prompts.
            best: None unless the best checkpoint is kept.
            trackers: on rank 0 only.
            check: called on rank 0 before each change; raises if another process may own the run's
                folder.
            note: shows a short text next to the progress bar.
        """
        self._student = student
        self._config = config
        self._losses = losses
        self._samples = samples
        self._best = best
        self._trackers = trackers
        self._check = check
        self._world = world
        self._progress = progress
        self._note = note
        self._last: ValidationRow | None = None
        self._page_due = -math.inf
        """Earliest `time.monotonic` of the next update; on rank 0."""

    def start(self, done: int) -> None:
        """Delete results of an interrupted run after `done` steps, and compute those missing."""

        def prune() -> tuple[bool, bool]:
            self._check()
            file = self._run_dir / VALIDATION_FILE
            if self._losses is not None:
                RowFile(file, done, self._check).close()
            if self._samples is not None:
                self._samples.delete_after(done)
            if self._best is not None:
                self._best.start(done)
            else:
                write_best(self._run_dir, None)
            validated = {row["step"] for row in iter_rows(file)}
            has_samples = self._samples is not None and self._samples.is_complete(done)
            return done in validated, has_samples

        has_losses, has_samples = on_first_rank(self._world, prune)
        self._run_due(done, losses=not has_losses, samples=not has_samples)

    def after_step(self, step: int) -> None:
        """Validate and sample if due; every rank must call this after each step."""
        self._run_due(step, losses=True, samples=True)

    def write_page(self, *, only_when_due: bool = False) -> None:
        """Write the run's report page, on rank 0; every rank must call this.

        Args:
            only_when_due: skip if writing the page would take more than `PAGE_SHARE` of the time
                since it was last written.
        """

        def write() -> None:
            started = time.monotonic()
            if only_when_due and started < self._page_due:
                return
            try:
                write_report(self._run_dir)
            except Exception as error:  # the page can be written later; do not stop training
                self._progress.log(f"warning: the report page could not be written: {error!r}")
            ended = time.monotonic()
            self._page_due = ended + (ended - started) / PAGE_SHARE

        on_first_rank(self._world, write)

    def _run_due(self, step: int, *, losses: bool, samples: bool) -> None:
        """Run what is due at this step; `losses` and `samples` say what is not done yet."""
        config, last = self._config, step == self._config.steps
        has_run = False
        if losses and self._losses and (last or step % config.validation.every == 0):
            self._validate(self._losses, step)
            has_run = True
        if samples and self._samples and (last or step % config.samples.every == 0):
            self._draw(self._samples, step)
            has_run = True
        if has_run:
            if self._best is not None:
                on_first_rank(self._world, partial(self._best.after_step, step))
            self.write_page(only_when_due=True)

    def _validate(self, losses: HeldOutLosses, step: int) -> None:
        row, damaged = losses(self._student, step, self._note)
        if not self._world.is_first:
            return
        for clip in damaged:
            self._progress.log(
                f"warning: held-out clip {clip.key!r} cannot be read and is excluded from this "
                f"validation: {clip.message}; sam2vx-pipeline cache verify says what to do"
            )
        file = RowFile(self._run_dir / VALIDATION_FILE, step, self._check)
        file.add(asdict(row))
        file.sync()
        file.close()
        values = {"diffusion": row.diffusion, **row.auxiliary}
        if self._trackers is not None:
            curves = {f"validation/{n}": v for n, v in values.items() if v is not None}
            self._trackers.add_scalars(step, curves)
        self._progress.log(_format_row(row, self._last))
        self._last = row

    def _draw(self, samples: TrainingSamples, step: int) -> None:
        drawn = samples(self._student, step, self._note)
        if not self._world.is_first:
            return
        scores = mean_scores(drawn.scores)
        if self._trackers is not None:
            for number, (video, prompt) in enumerate(
                zip(drawn.videos, self._config.samples.prompts, strict=True)
            ):
                self._trackers.add_video(step, f"samples/{number}", video, prompt)
            self._trackers.add_scalars(
                step, {f"samples/{name}": value for name, value in scores.items()}
            )
        warning = f"; {drawn.nonfinite:.0%} of one video is NaN or infinite"
        self._progress.log(
            f"step {step}, samples: {_paths(drawn.videos)}{warning if drawn.nonfinite else ''}"
        )
        if faded := washed_out(scores, samples.scores_before_training()):
            self._progress.log(
                f"warning: the samples are washed out, compared with the base model's: "
                f"{', '.join(faded)}; a lower learning rate or train.lgf.weight may help, unless "
                "the clips look so themselves"
            )

    @property
    def _run_dir(self) -> Path:
        return self._config.run_dir


def _format_row(row: ValidationRow, before: ValidationRow | None) -> str:
    values = {"diffusion": row.diffusion, **row.auxiliary}
    older = {} if before is None else {"diffusion": before.diffusion, **before.auxiliary}
    parts = []
    for name, value in values.items():
        current = math.nan if value is None else value
        previous = older.get(name)
        parts.append(
            f"{name} {current:.4f}" + (f" ({current - previous:+.4f})" if previous else "")
        )
    return f"step {row.step}, {row.clips} held-out clips: {', '.join(parts)}"


def _paths(videos: list[Path]) -> str:
    return str(videos[0]) if len(videos) == 1 else f"{len(videos)} videos in {videos[0].parent}"


def build_validation(
    run: Run,
    student: Student,
    embeds: dict[str, Tensor],
    *,
    trackers: Trackers | None,
    note: Callable[[str], None],
) -> Validation:
    """Build the validation of a run.

    Args:
        student: the module inside the engine.
        embeds: from `embed_prompts`.
        trackers: on rank 0 only.
        note: shows a short text next to the progress bar.
    """
    config, losses, samples, best = run.config, None, None, None
    if run.stores.held_out:
        losses = HeldOutLosses(
            run.samples,
            run.training_step(),
            timesteps=config.validation.timesteps,
            objectives=config.objectives,
            world=run.world,
        )
    if config.samples.prompts:
        samples = TrainingSamples(run, embeds)
    if (better := check_keep_best(config)) is not None:
        best = BestKeeper(
            config,
            better,
            held_out=len(run.stores.held_out),
            check=run.lock.check,
            progress=run.progress,
        )
    return Validation(
        student,
        config,
        losses=losses,
        samples=samples,
        best=best,
        trackers=trackers,
        check=run.lock.check,
        world=run.world,
        progress=run.progress,
        note=note,
    )
