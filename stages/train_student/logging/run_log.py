"""Logs of a training run: JSON lines, console table and experiment trackers; on rank 0 only.

<run_dir>/
    losses.jsonl          a line per step that updated the weights: identical for identical runs
    performance.jsonl     a line per step: time, wait, memory; differs from run to run
    skipped_steps.jsonl   a line per skipped step, with its clips
    damaged_clips.jsonl   a line per step and clip that was damaged or gone
    tensorboard/, wandb/  the same values, as set by train.report_to
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Self

from stages.progress import Progress
from stages.train_student.config import TrainConfig
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
)
from stages.train_student.logging.trackers import Trackers

_MIN_WIDTH = 11


class RunLog:
    """Writes every step to the run's files and trackers, and some of them to the console."""

    def __init__(
        self,
        config: TrainConfig,
        steps_done: int,
        *,
        check: Callable[[], None],
        progress: Progress,
    ) -> None:
        """Open the files, and truncate rows that an interrupted run wrote after `steps_done` steps.

        Args:
            check: called before each change to a file; raises if another process may own it.
        """
        self.trackers = Trackers(
            config.run_dir,
            config.report_to,
            steps_done=steps_done,
            project=config.wandb_project,
            settings=config.model_dump(mode="json"),
        )
        self._files = {
            name: RowFile(config.run_dir / name, steps_done, check)
            for name in (LOSSES_FILE, PERFORMANCE_FILE, SKIPPED_FILE, DAMAGED_FILE)
        }
        self._config = config
        self._progress = progress
        self._has_headings = False
        self._warned: set[str] = set()

    def add(self, rows: StepRows) -> None:
        """Log a step; print it every `log_every` steps."""
        for damaged in rows.damaged:
            self._files[DAMAGED_FILE].add(asdict(damaged))
            self._warn(damaged)
        if rows.skipped is not None:
            self._files[SKIPPED_FILE].add(asdict(rows.skipped))
            self._progress.log(
                f"step {rows.skipped.step} skipped: its {rows.skipped.what} is NaN or infinite; "
                f"clips {', '.join(map(repr, rows.skipped.suspects()))}"
            )
        if rows.losses is not None:
            self._files[LOSSES_FILE].add(asdict(rows.losses))
        self._files[PERFORMANCE_FILE].add(asdict(rows.performance))
        self.trackers.add_scalars(rows.performance.step, _curves(rows))
        if rows.losses is not None:
            self._show(rows.losses, rows.performance)

    def sync(self) -> None:
        """Sync the rows to disk; called before each checkpoint."""
        for file in self._files.values():
            file.sync()
        self.trackers.flush()

    def _warn(self, damaged: DamagedRow) -> None:
        if damaged.key not in self._warned:
            self._warned.add(damaged.key)
            what = "is gone" if damaged.gone else "cannot be read"
            remedy = "" if damaged.gone else "; run sam2vx-pipeline cache repair after the run"
            self._progress.log(
                f"warning: clip {damaged.key!r} {what}, using another instead: "
                f"{damaged.message}{remedy}"
            )

    def _show(self, losses: LossRow, performance: PerformanceRow) -> None:
        """Print a line of the console table, below its headings."""
        objectives = self._config.objectives
        names = ("step", "loss", "diffusion", *objectives, "grad norm", "rate", "s/step", "wait")
        cells = (
            str(losses.step),
            f"{losses.loss:.4f}",
            f"{losses.diffusion:.4f}",
            *(f"{losses.auxiliary[name]:.4f}" for name in objectives),
            f"{losses.grad_norm:.3g}",
            f"{losses.lr:.2e}",
            f"{performance.seconds:.2f}",
            f"{performance.wait_seconds / performance.seconds:.0%}",
        )
        widths = [max(_MIN_WIDTH, len(name) + 2) for name in names]
        lines = [cells]
        if not self._has_headings:
            lines, self._has_headings = [names, cells], True
        elif losses.step % self._config.log_every:
            return
        for line in lines:
            padded = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
            self._progress.log("".join(padded))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for file in self._files.values():
            file.close()
        self.trackers.close(failed=error is not None)


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
