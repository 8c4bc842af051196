"""When a training looks at held-out clips and draws samples, and who is told; `train` owns one.

Both are done before the first step, too: what the base model does is what everything is judged by.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from stages.progress import Progress
from stages.run_report import write_report
from stages.run_report.records import VALIDATION_FILE
from stages.train_student.config import TrainConfig
from stages.train_student.distributed import World, on_first_rank
from stages.train_student.logs.boards import Boards
from stages.train_student.logs.row_file import RowFile, read_rows
from stages.train_student.logs.rows import ValidationRow
from stages.train_student.student import Student
from stages.train_student.validation.held_out_losses import HeldOutLosses
from stages.train_student.validation.samples import TrainingSamples

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
