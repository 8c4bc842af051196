"""The losses of a run, as they are written and shown; rank 0 of the training loop keeps one.

`losses.jsonl` has one line per step, with every float as its shortest exact decimal, so that two
runs can be compared as text. TensorBoard gets the same numbers and the seconds each step took, the
console every `log_every`th row.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from cache_schema.durable import write_whole
from stages.progress import Progress

LOSSES_FILE = "losses.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRow:
    """One optimiser step, averaged over the batch."""

    step: int
    """From 1: the number of steps done with it."""
    loss: float
    diffusion: float
    auxiliary: float | None
    """Before weighting; None for plain fine-tuning."""
    grad_norm: float
    """Before clipping."""
    lr: float

    def as_line(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self))


def read_losses(run_dir: Path) -> list[LossRow]:
    """Every whole line of a run's losses; empty where there are none."""
    path = run_dir / LOSSES_FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            rows.append(LossRow(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} has a damaged line: {line[:80]!r}") from error
    return rows


class LossRecord:
    """Writes rows while a run goes on."""

    def __init__(
        self, run_dir: Path, steps_done: int, *, log_every: int, auxiliary: str, progress: Progress
    ) -> None:
        """Open the files, dropping what an interrupted run wrote after `steps_done` steps.

        Args:
            auxiliary: heading of the auxiliary loss's column.
        """
        path = run_dir / LOSSES_FILE
        kept = [row.as_line() + "\n" for row in read_losses(run_dir) if row.step <= steps_done]
        write_whole(path, "".join(kept).encode(), temporary=path.with_name(f".{path.name}.partial"))
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=steps_done + 1 if steps_done else None
        )
        self._log_every = log_every
        self._progress = progress
        self._headings = ("step", "loss", "diffusion", auxiliary, "grad norm", "rate", "s/step")
        self._shown = False

    def add(self, row: LossRow, seconds: float) -> None:
        """Write a row, and show it when its turn has come."""
        self._file.write(row.as_line() + "\n")
        self._file.flush()
        for name, value in asdict(row).items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, row.step)
        self._board.add_scalar("train/seconds_per_step", seconds, row.step)
        if row.step % self._log_every == 0 or not self._shown:
            self._show(row, seconds)

    def sync(self) -> None:
        """Make the rows so far survive a power failure; before each checkpoint is completed."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def _show(self, row: LossRow, seconds: float) -> None:
        if not self._shown:
            self._progress.log("".join(f"{heading:>11}" for heading in self._headings))
            self._shown = True
        auxiliary = "-" if row.auxiliary is None else f"{row.auxiliary:.4f}"
        cells = (
            str(row.step),
            f"{row.loss:.4f}",
            f"{row.diffusion:.4f}",
            auxiliary,
            f"{row.grad_norm:.3g}",
            f"{row.lr:.2e}",
            f"{seconds:.2f}",
        )
        self._progress.log("".join(f"{cell:>11}" for cell in cells))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()
