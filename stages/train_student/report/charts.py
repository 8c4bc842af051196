"""Charts of the report page, as SVG drawn by matplotlib without a display.

A long run has more steps than a chart has pixels, so it is drawn as the mean of each block of
steps, over a band from the block's minimum to its maximum.
"""

import io
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from stages.train_student.report.records import (
    Points,
    Row,
    RunRecords,
    loss_of,
    mean_scores,
    objectives,
    points,
)

COLOURS = ("#2f6f9f", "#c8642b", "#4b8b3b", "#8a4f9e", "#9a7b1c", "#5b6770")
"""Of different lightness, so that they can be distinguished with colour blindness."""
_GRID = "#e3e6ea"
_TEXT = "#4a5260"
_MAX_POINTS = 300
_SIZE_INCHES = (6.4, 2.9)
_AXES = (0.115, 0.155, 0.86, 0.79)
"""Left, bottom, width and height within the chart."""
_TITLES = {
    "diffusion": "Diffusion loss",
    "lgf": "Local Gram Flow",
    "repa": "REPA",
    "token-relation": "Token relations",
    "mask": "Mask",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Points
    _: KW_ONLY
    dots: bool = False
    """Mark each value with a dot, for curves with few values."""
    exact: bool = False
    """Draw without smoothing, for functions of the step such as the learning rate."""
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the page: its curves, texts and axes."""

    title: str
    caption: str
    curves: Sequence[Curve]
    _: KW_ONLY
    y_label: str = "loss"
    x_label: Literal["step", "timestep"] = "step"
    logarithmic: bool = False
    from_zero: bool = False
    marked: Sequence[int] = ()
    """Skipped steps, marked on the x axis."""


def as_svg(chart: Chart) -> bytes:
    """Draw a plot; equal inputs give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "run report",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 6),  # longer labels would push out the axis title
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": "#b8bec7",
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    out = io.BytesIO()
    with rc_context(settings):
        figure = Figure(figsize=_SIZE_INCHES)
        # matplotlib's layout engines would draw every plot twice.
        axes = figure.add_axes(_AXES)
        for number, curve in enumerate(chart.curves):
            _draw(axes, curve, curve.colour or COLOURS[number % len(COLOURS)])
        _style_axes(axes, chart)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    x, y = (np.asarray(side, dtype=float) for side in curve.points)
    if curve.exact and len(x) > _MAX_POINTS:
        kept = extremes(y, _MAX_POINTS)
        x, y = x[kept], y[kept]
    if (curve.dots and len(x) <= _MAX_POINTS) or len(x) < 3:
        axes.plot(x, y, "o-", color=colour, markersize=3.5, linewidth=1.4, label=curve.label)
    elif curve.exact:
        axes.plot(x, y, color=colour, linewidth=1.6, label=curve.label)
    elif len(x) <= _MAX_POINTS:
        smooth = running_mean(y, len(x) // 20)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35 if len(x) >= 40 else 0.9)
        axes.plot(x, smooth, color=colour, linewidth=1.6, label=curve.label)
    else:
        blocks = np.array_split(np.arange(len(x)), _MAX_POINTS)
        middle = [x[block].mean() for block in blocks]
        low, high = ([reduce(y[b]) for b in blocks] for reduce in (np.min, np.max))
        axes.fill_between(middle, low, high, color=colour, alpha=0.18, linewidth=0)
        mean = running_mean(np.array([y[block].mean() for block in blocks]), _MAX_POINTS // 60)
        axes.plot(middle, mean, color=colour, linewidth=1.6, label=curve.label)


def extremes(values: np.ndarray, num_blocks: int) -> np.ndarray:
    """Indices of the first, smallest, largest and last value of each block."""
    kept = [
        index
        for block in np.array_split(np.arange(len(values)), min(num_blocks, len(values)))
        for index in (
            block[0],
            block[values[block].argmin()],
            block[values[block].argmax()],
            block[-1],
        )
    ]
    return np.unique(kept)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and up to `reach` neighbours on both sides, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    indices = np.arange(len(values))
    first, last = np.maximum(indices - reach, 0), np.minimum(indices + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _style_axes(axes: Any, chart: Chart) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.margins(x=0.01)
    if chart.x_label == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xlim(0, 1000)
    values = [np.asarray(curve.points[1]) for curve in chart.curves]
    if chart.logarithmic and all(of_curve.min() > 0 for of_curve in values):
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(0, 1.08 * max(of_curve.max() for of_curve in values) or 1)
    if chart.marked:
        axes.plot(
            chart.marked,
            [0.0] * len(chart.marked),
            "|",
            color="#b3261e",
            markersize=9,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label="skipped",
        )
    if len(chart.curves) > 1 or chart.marked:
        axes.legend(frameon=False, fontsize=8, ncols=3)


def training_charts(run: RunRecords) -> list[Chart]:
    """Losses, losses by timestep, gradient norm and learning rate."""
    found = run.losses.points
    names = run.losses.objectives
    return _non_empty(
        Chart(
            "Total loss",
            "Sum of the diffusion loss and the weighted auxiliary losses.",
            [Curve("Total loss", found("loss"))],
            marked=tuple(int(row["step"]) for row in run.skipped),
        ),
        Chart(
            "Diffusion loss",
            "Mean squared error of the velocity.",
            [Curve("Diffusion loss", found("diffusion"))],
        ),
        *(
            Chart(
                _title(name),
                "Auxiliary loss, before weighting.",
                [Curve(_title(name), found(name), colour=COLOURS[1 + number % 4])],
            )
            for number, name in enumerate(names)
        ),
        *(
            Chart(
                f"{_title(name)} by timestep",
                "Training clips, by their timestep: 999 is pure noise.",
                [
                    Curve(part, means[name], dots=True)
                    for part, means in run.losses.by_noise.items()
                    if name in means
                ],
                x_label="timestep",
            )
            for name in ("diffusion", *names)
        ),
        Chart(
            "Norm of the gradient",
            "Before clipping.",
            [Curve("Norm of the gradient", found("grad_norm"))],
            y_label="norm",
            logarithmic=True,
        ),
        Chart(
            "Learning rate",
            "At each step.",
            [Curve("rate", found("lr"), exact=True)],
            y_label="rate",
            from_zero=True,
        ),
    )


def validation_charts(run: RunRecords) -> list[Chart]:
    """Losses on held-out clips, over the run and by timestep."""
    names = ("diffusion", *objectives(run.validation))
    over_run = [
        Chart(
            _title(name),
            "On held-out clips, fixed noise.",
            [
                Curve(
                    _title(name),
                    points(run.validation, loss_of(name)),
                    dots=True,
                    colour=COLOURS[number % 5],
                )
            ],
        )
        for number, name in enumerate(names)
    ]
    first_and_last = (
        [run.validation[0], run.validation[-1]] if run.validation[1:] else run.validation
    )
    by_timestep = [
        Chart(
            f"{_title(name)} by timestep",
            "On held-out clips: timestep 0 is almost no noise, 999 is pure noise.",
            [
                Curve(f"step {row['step']}", _over_timesteps(row, name), dots=True)
                for row in first_and_last
            ],
            x_label="timestep",
        )
        for name in names
    ]
    return _non_empty(*over_run, *by_timestep)


def sample_charts(run: RunRecords) -> list[Chart]:
    """Mean scores of the samples over the run; none with samples of fewer than two steps."""
    steps: dict[int, list[Row]] = {}
    for sample in run.samples:
        steps.setdefault(sample.step, []).append(sample.scores)
    means = {step: mean_scores(scores) for step, scores in steps.items()}
    names = list(dict.fromkeys(name for of_step in means.values() for name in of_step))
    if len(means) < 2:
        return []
    rows = [dict.fromkeys(names) | of_step | {"step": step} for step, of_step in means.items()]
    return _non_empty(
        *(
            Chart(
                name.replace("_", " ").capitalize(),
                _describe_mean(run, name),
                [
                    Curve(
                        name,
                        points(rows, itemgetter(name)),
                        dots=True,
                        colour=COLOURS[number % 5],
                    )
                ],
            )
            for number, name in enumerate(names)
        )
    )


def _describe_mean(run: RunRecords, name: str) -> str:
    missing = sum(sample.scores.get(name) is None for sample in run.samples)
    if not missing:
        return "Mean over the samples."
    return (
        "Mean over the samples that have a value: "
        f"{missing} of {len(run.samples)} over the run have none."
    )


def speed_charts(run: RunRecords) -> list[Chart]:
    """Step time, wait for data, share of the GPUs' peak FLOP/s, and memory."""
    rows = run.performance
    timed = np.where(rows.of("seconds") > 0, rows.of("seconds"), np.nan)
    wait_percent = rows.finite(100 * rows.of("wait_seconds") / timed)
    charts = (
        Chart(
            "Seconds a step",
            "The whole step, and the part of it spent waiting for the loader.",
            [
                Curve("step", rows.points("seconds")),
                Curve("waiting for data", rows.points("wait_seconds")),
            ],
            y_label="seconds",
        ),
        Chart(
            "Share of the step spent waiting for data",
            "Above a few per cent, more train.loader_workers or a faster disk may help.",
            [Curve("share", wait_percent, colour=COLOURS[1])],
            y_label="per cent",
        ),
        Chart(
            "Share of the GPUs' peak",
            "Model FLOP/s, without recomputation, relative to the GPUs' peak.",
            [Curve("share", rows.finite(100 * rows.of("share_of_peak")))],
            y_label="per cent",
        ),
        Chart(
            "Peak memory",
            "Of rank 0's GPU, or of its process without one.",
            [Curve("memory", rows.finite(rows.of("peak_memory_bytes") / 1e9))],
            y_label="GB",
        ),
    )
    return _non_empty(*(replace(chart, from_zero=True) for chart in charts))


def _non_empty(*charts: Chart) -> list[Chart]:
    """Drop curves without points, and charts without curves."""
    found = [replace(c, curves=[one for one in c.curves if len(one.points[0])]) for c in charts]
    return [chart for chart in found if chart.curves]


def _over_timesteps(row: Row, name: str) -> Points:
    found = row["by_timestep"]
    pairs = [(t, v) for t, v in zip(found["timestep"], found[name], strict=True) if v is not None]
    return np.array([t for t, _ in pairs]), np.array([v for _, v in pairs])


def _title(name: str) -> str:
    return _TITLES.get(name, name)
