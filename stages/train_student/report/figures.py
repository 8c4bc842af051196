"""Key figures of a run: steps, losses, speed and memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stages.train_student.report.records import RunRecords, loss_of, objectives, points


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A key figure: name, value, and a note to put it in context."""

    name: str
    value: str
    note: str = ""

    @property
    def text(self) -> str:
        """Value and note, on one line."""
        return f"{self.value} ({self.note})" if self.note else self.value


def by_name(found: Iterable[Figure]) -> dict[str, dict[str, str]]:
    """Name -> value and note, for JSON."""
    return {one.name: {"value": one.value, "note": one.note} for one in found}


def figures(run: RunRecords) -> list[Figure]:
    """All figures that the run's files have data for."""
    planned = run.planned_steps
    found = [
        Figure(
            name="steps",
            value=f"{run.steps_done:,}",
            note="finished" if run.finished else f"of {planned:,}" if planned else "in progress",
        ),
        *loss_figures(run),
        *best_figures(run),
        *speed_figures(run),
        *_memory(run),
    ]
    if run.skipped or run.damaged:
        found.append(
            Figure(
                name="mishaps",
                value=str(len(run.skipped) + len(run.damaged)),
                note=f"skipped steps: {len(run.skipped)}, damaged or gone clips: "
                f"{len(run.damaged)}",
            )
        )
    return found


def loss_figures(run: RunRecords) -> list[Figure]:
    """Training loss as a mean over several steps, and all losses on the held-out clips.

    A single step's loss is noisy: it is of few clips, each at one random timestep.
    """
    found = []
    _, loss = run.losses.points("loss")
    if len(loss):
        few = max(len(loss) // 20, 1)
        found.append(
            Figure(
                name="training loss",
                value=_number(_mean(loss[-few:])),
                note=f"mean of the last {_steps(few)}; {_number(_mean(loss[:few]))} in the first"
                if len(loss) > 1
                else "one step",
            )
        )
    for name in ("diffusion", *objectives(run.validation)):
        steps, values = points(run.validation, loss_of(name))
        if len(values):
            note = _compare_to_start(steps, values)
            found.append(Figure(name=f"held-out {name} loss", value=_number(values[-1]), note=note))
    return found


def _compare_to_start(steps: np.ndarray, values: np.ndarray) -> str:
    """The first value, and the lowest if the loss has risen since."""
    first = "before training" if steps[0] == 0 else f"at step {steps[0]}"
    if len(values) == 1:
        return first
    note = f"{_number(values[0])} {first}"
    lowest = values.min()
    if lowest < values[-1]:
        where = steps[values.argmin()]
        best = first if where == steps[0] else f"{_number(lowest)} at step {where}"
        note += f"; lowest {best}, and risen since"
    return note


def best_figures(run: RunRecords) -> list[Figure]:
    """Step of the best checkpoint, and the value that it was chosen by; none without a best one."""
    best = run.best
    if best is None:
        return []
    note = f"{best.curve} {_number(best.value)}"
    if best.before_training is not None:
        note += f"; {_number(best.before_training)} before training"
    if best.step not in run.checkpoints:
        note += "; its checkpoint is gone"
    return [Figure(name="best checkpoint", value=f"step {best.step:,}", note=note)]


def speed_figures(run: RunRecords) -> list[Figure]:
    """Mean step time and clips per second, over all steps.

    A step is timed from requesting its first batch to the end of the update, without validation,
    samples and checkpoints.
    """
    timed = run.performance.of("seconds") > 0
    count = int(timed.sum())
    if not count:
        return []
    found = []
    step_seconds = run.performance.of("seconds")[timed]
    seconds = float(step_seconds.sum())
    waited = np.nansum(run.performance.of("wait_seconds")[timed])
    median = float(np.partition(step_seconds, count // 2)[count // 2])
    note = f"mean; {in_time(seconds)} for {_steps(count)}, waiting for data {waited / seconds:.1%}"
    if abs(median - seconds / count) > 0.1 * median:
        note += f"; the median is {in_time(median)}"
    note += "; without validation, samples and checkpoints"
    found.append(Figure(name="a step", value=in_time(seconds / count), note=note))
    clips = np.nansum(run.performance.of("clips_per_second")[timed] * step_seconds)
    shares = run.performance.of("share_of_peak")[timed]
    known = np.isfinite(shares)
    peak = ""
    if known.any():
        share = (shares[known] * step_seconds[known]).sum() / step_seconds[known].sum()
        peak = f"{share:.0%} of the GPUs' peak"
    found.append(Figure(name="clips a second", value=_number(clips / seconds), note=peak))
    return found


def _memory(run: RunRecords) -> list[Figure]:
    _, memory = run.performance.points("peak_memory_bytes")
    if not len(memory):
        return []
    return [Figure(name="peak memory", value=f"{memory.max() / 1e9:.3g} GB")]


def _steps(count: int) -> str:
    return f"{count:,} {'step' if count == 1 else 'steps'}"


def in_time(seconds: float) -> str:
    """Format a duration: 0.21 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 60 or not math.isfinite(seconds):
        if seconds >= 10:
            return f"{seconds:.0f} s"
        return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 1
    return f"{value:.{min(digits, 5)}f}"


def _mean(values: np.ndarray) -> float:
    return float(values.mean())
