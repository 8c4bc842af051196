"""Everything that a training logs as it runs; rank 0 only.

<run_dir>/
    losses.jsonl          a line per step that moved the weights: equal for equal runs
    performance.jsonl     a line per step: seconds, waiting, memory; differs from run to run
    skipped_steps.jsonl   a line per skipped step, with its clips
    damaged_clips.jsonl   a line per clip and step that was damaged or gone
    tensorboard/, wandb/  the same numbers, as set by train.report_to
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from stages.progress import Progress
from stages.train_student.logging.rows import (
    DAMAGED_FILE,
    LOSSES_FILE,
    PERFORMANCE_FILE,
    SKIPPED_FILE,
    DamagedRow,
    LossRow,
    PerformanceRow,
    RowFile,
    StepRows,
    as_dict,
)
from stages.train_student.logging.trackers import Boards

_NARROWEST = 11


class Table:
    """Lays out headings and rows in columns of equal width."""

    def __init__(self, objectives: tuple[str, ...]) -> None:
        self._objectives = objectives
        names = ("step", "loss", "diffusion", *objectives, "grad norm", "rate", "s/step", "wait")
        self._names = names
        self._widths = [max(_NARROWEST, len(name) + 2) for name in names]
        self.begun = False
        """Whether the headings were asked for."""

    def headings(self) -> str:
        """The first line."""
        self.begun = True
        return self._line(self._names)

    def row(self, losses: LossRow, performance: PerformanceRow) -> str:
        """One step's line."""
        cells = (
            str(losses.step),
            f"{losses.loss:.4f}",
            f"{losses.diffusion:.4f}",
            *(f"{losses.auxiliary[name]:.4f}" for name in self._objectives),
            f"{losses.grad_norm:.3g}",
            f"{losses.lr:.2e}",
            f"{performance.seconds:.2f}",
            f"{performance.wait_seconds / performance.seconds:.0%}",
        )
        return self._line(cells)

    def _line(self, cells: tuple[str, ...]) -> str:
        return "".join(f"{cell:>{width}}" for cell, width in zip(cells, self._widths, strict=True))


class RunLog:
    """Writes every step to the run's files and boards, and shows some of them."""

    def __init__(
        self,
        run_dir: Path,
        steps_done: int,
        boards: Boards,
        *,
        check: Callable[[], None],
        objectives: tuple[str, ...],
        log_every: int,
        progress: Progress,
    ) -> None:
        """Open the files, dropping what an interrupted run wrote after `steps_done` steps.

        Args:
            boards: closed with the log.
            check: called before a file is changed; raises if it may be another process's.
            objectives: names of the auxiliary losses, in the order of the table's columns.
            log_every: steps between rows of the table.
        """
        self._losses = RowFile(run_dir / LOSSES_FILE, steps_done, check)
        self._performance = RowFile(run_dir / PERFORMANCE_FILE, steps_done, check)
        self._skipped = RowFile(run_dir / SKIPPED_FILE, steps_done, check)
        self._damaged = RowFile(run_dir / DAMAGED_FILE, steps_done, check)
        self._boards = boards
        self._log_every = log_every
        self._progress = progress
        self._table = Table(objectives)
        self._warned: set[str] = set()

    def add(self, rows: StepRows) -> None:
        """Write a step down, and show it when its turn has come."""
        for damaged in rows.damaged:
            self._damaged.add(as_dict(damaged))
            self._warn(damaged)
        if rows.skipped is not None:
            self._skipped.add(as_dict(rows.skipped))
            self._progress.log(
                f"step {rows.skipped.step} skipped: its {rows.skipped.what} is no number; clips "
                f"{', '.join(map(repr, rows.skipped.suspects()))}"
            )
        if rows.losses is not None:
            self._losses.add(as_dict(rows.losses))
        self._performance.add(as_dict(rows.performance))
        self._boards.add_scalars(rows.performance.step, _curves(rows))
        if rows.losses is not None:
            self._show(rows.losses, rows.performance)

    def sync(self) -> None:
        """Make the rows so far survive a power failure; before each checkpoint is completed."""
        for file in self._files:
            file.sync()
        self._boards.flush()

    @property
    def _files(self) -> tuple[RowFile, ...]:
        return self._losses, self._performance, self._skipped, self._damaged

    def _warn(self, damaged: DamagedRow) -> None:
        if damaged.key not in self._warned:
            self._warned.add(damaged.key)
            what = "is gone" if damaged.gone else "cannot be read"
            self._progress.log(
                f"warning: clip {damaged.key!r} {what}, another takes its place: {damaged.message}"
            )

    def _show(self, losses: LossRow, performance: PerformanceRow) -> None:
        if not self._table.begun:
            self._progress.log(self._table.headings())
        elif losses.step % self._log_every:
            return
        self._progress.log(self._table.row(losses, performance))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()
        self._boards.close(failed=error is not None)


def _curves(rows: StepRows) -> dict[str, float]:
    performance = rows.performance
    curves = {
        "performance/seconds_per_step": performance.seconds,
        "performance/wait_share": performance.wait_seconds / performance.seconds,
        "performance/clips_per_second": performance.clips_per_second,
        "performance/peak_memory_gb": performance.peak_memory_bytes / 1e9,
    }
    if performance.share_of_peak is not None:
        curves["performance/share_of_peak"] = performance.share_of_peak
    if rows.losses is not None:
        losses = rows.losses
        curves |= {
            "train/loss": losses.loss,
            "train/diffusion": losses.diffusion,
            "train/grad_norm": losses.grad_norm,
            "train/lr": losses.lr,
        }
        curves |= {f"train/{name}": value for name, value in losses.auxiliary.items()}
    return curves
