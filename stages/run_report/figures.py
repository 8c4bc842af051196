"""What a run came to, in a few figures; the page of a run opens with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.run_report.records import RunRecords, points


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number, what it is, and a few words to judge it by."""

    name: str
    value: str
    note: str = ""


def figures(run: RunRecords) -> list[Figure]:
    """Those that the run's files can tell."""
    wanted = run.steps_wanted
    found = [
        Figure(
            name="steps",
            value=f"{run.steps_done:,}",
            note="finished" if run.finished else f"of {wanted:,}" if wanted else "going on",
        ),
        *_losses(run),
        *_performance(run),
    ]
    if run.skipped or run.damaged:
        found.append(
            Figure(
                name="mishaps",
                value=str(len(run.skipped) + len(run.damaged)),
                note=f"steps skipped: {len(run.skipped)}, damaged clips met: {len(run.damaged)}",
            )
        )
    return found


def _losses(run: RunRecords) -> list[Figure]:
    found = []
    _, loss = points(run.losses, lambda row: row.get("loss"))
    if loss:
        few = max(len(loss) // 20, 1)
        found.append(
            Figure(
                name="training loss",
                value=_number(_mean(loss[-few:])),
                note=f"{_number(_mean(loss[:few]))} at the start",
            )
        )
    _, held_out = points(run.validation, lambda row: row.get("diffusion"))
    if held_out:
        lowest = f", lowest {_number(min(held_out))}" if min(held_out) < held_out[-1] else ""
        found.append(
            Figure(
                name="held-out diffusion loss",
                value=_number(held_out[-1]),
                note=f"{_number(held_out[0])} at step {run.validation[0]['step']}{lowest}",
            )
        )
    return found


def _performance(run: RunRecords) -> list[Figure]:
    found = []
    _, seconds = points(run.performance, lambda row: row.get("seconds"))
    if seconds:
        _, waits = points(run.performance, lambda row: row.get("wait_seconds"))
        found.append(
            Figure(
                name="a step",
                value=in_time(_median(seconds)),
                note=f"{in_time(sum(seconds))} in all, waiting for data "
                f"{sum(waits) / sum(seconds):.1%}",
            )
        )
    _, rates = points(run.performance, lambda row: row.get("clips_per_second"))
    if rates:
        _, shares = points(run.performance, lambda row: row.get("share_of_peak"))
        peak = f"{_median(shares):.0%} of the GPUs' peak" if shares else ""
        found.append(Figure(name="clips a second", value=_number(_median(rates)), note=peak))
    _, memory = points(run.performance, lambda row: row.get("peak_memory_bytes"))
    if memory:
        found.append(Figure(name="peak memory", value=f"{max(memory) / 1e9:.3g} GB"))
    return found


def in_time(seconds: float) -> str:
    """A duration for people: 0.21 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 1
    return f"{value:.{min(digits, 5)}f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
