"""Logs of a training run: JSON lines, console table and experiment trackers; on rank 0 only.

<run_dir>/
    losses.jsonl          a line per step that updated the weights: identical for identical runs
    performance.jsonl     a line per step: time, wait, memory; differs from run to run
    skipped_steps.jsonl   a line per skipped step, with its clips
    damaged_clips.jsonl   a line per step and clip that was damaged or gone
    tensorboard/, wandb/  the same values, as set by train.report_to
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
from stages.train_student.logging.trackers import Trackers

_MIN_WIDTH = 11


class Table:
    """Formats the headings and rows of the console table."""

    def __init__(self, objectives: tuple[str, ...]) -> None:
        self._objectives = objectives
        names = ("step", "loss", "diffusion", *objectives, "grad norm", "rate", "s/step", "wait")
        self._names = names
        self._widths = [max(_MIN_WIDTH, len(name) + 2) for name in names]
        self.has_headings = False
        """Whether the headings were formatted."""

    def headings(self) -> str:
        """The first line."""
        self.has_headings = True
        return self._line(self._names)

    def row(self, losses: LossRow, performance: PerformanceRow) -> str:
        """The line of one step."""
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
    """Writes every step to the run's files and trackers, and some of them to the console."""

    def __init__(
        self,
        run_dir: Path,
        steps_done: int,
        trackers: Trackers,
        *,
        check: Callable[[], None],
        objectives: tuple[str, ...],
        log_every: int,
        progress: Progress,
    ) -> None:
        """Open the files, and truncate rows that an interrupted run wrote after `steps_done` steps.

        Args:
            trackers: closed together with the log.
            check: called before each change to a file; raises if another process may own it.
            objectives: names of the auxiliary losses, in the order of the table's columns.
            log_every: steps between rows of the table.
        """
        self._losses = RowFile(run_dir / LOSSES_FILE, steps_done, check)
        self._performance = RowFile(run_dir / PERFORMANCE_FILE, steps_done, check)
        self._skipped = RowFile(run_dir / SKIPPED_FILE, steps_done, check)
        self._damaged = RowFile(run_dir / DAMAGED_FILE, steps_done, check)
        self._trackers = trackers
        self._log_every = log_every
        self._progress = progress
        self._table = Table(objectives)
        self._warned: set[str] = set()

    def add(self, rows: StepRows) -> None:
        """Log a step; print it every `log_every` steps."""
        for damaged in rows.damaged:
            self._damaged.add(as_dict(damaged))
            self._warn(damaged)
        if rows.skipped is not None:
            self._skipped.add(as_dict(rows.skipped))
            self._progress.log(
                f"step {rows.skipped.step} skipped: its {rows.skipped.what} is NaN or infinite; "
                f"clips {', '.join(map(repr, rows.skipped.suspects()))}"
            )
        if rows.losses is not None:
            self._losses.add(as_dict(rows.losses))
        self._performance.add(as_dict(rows.performance))
        self._trackers.add_scalars(rows.performance.step, _curves(rows))
        if rows.losses is not None:
            self._show(rows.losses, rows.performance)

    def sync(self) -> None:
        """Sync the rows to disk; called before each checkpoint."""
        for file in self._files:
            file.sync()
        self._trackers.flush()

    @property
    def _files(self) -> tuple[RowFile, ...]:
        return self._losses, self._performance, self._skipped, self._damaged

    def _warn(self, damaged: DamagedRow) -> None:
        if damaged.key not in self._warned:
            self._warned.add(damaged.key)
            what = "is gone" if damaged.gone else "cannot be read"
            self._progress.log(
                f"warning: clip {damaged.key!r} {what}, using another instead: {damaged.message}"
            )

    def _show(self, losses: LossRow, performance: PerformanceRow) -> None:
        if not self._table.has_headings:
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
        self._trackers.close(failed=error is not None)


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
