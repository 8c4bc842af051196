"""The console's table of losses, a line of text at a time; `RunLog` shows it."""

from stages.train_student.logs.rows import LossRow, PerformanceRow

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
