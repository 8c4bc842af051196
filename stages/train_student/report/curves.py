"""Curves as SVG, drawn by matplotlib without a display.

A long run has more steps than a picture has pixels, so it is drawn as the mean of each block of
steps, over a band from the block's minimum to its maximum.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from stages.train_student.report.columns import Points

COLOURS = ("#2f6f9f", "#c8642b", "#4b8b3b", "#8a4f9e", "#9a7b1c", "#5b6770")
"""Of different lightness, so that they can be distinguished with colour blindness."""
_GRID = "#e3e6ea"
_TEXT = "#4a5260"
_MAX_POINTS = 300
_SIZE_INCHES = (6.4, 2.9)
_AXES = (0.115, 0.155, 0.86, 0.79)
"""Left, bottom, width and height within the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a plot."""

    label: str
    points: Points
    dots: bool = False
    """Mark each value with a dot, for curves with few values."""
    exact: bool = False
    """Draw without smoothing, for functions of the step such as the learning rate."""
    colour: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A plot of the page: its curves, texts and axes."""

    title: str
    caption: str
    curves: Sequence[Curve]
    y_label: str
    x_label: Literal["step", "timestep"] = "step"
    logarithmic: bool = False
    from_zero: bool = False
    marked: Sequence[int] = field(default_factory=tuple)
    """Skipped steps, marked on the x axis."""


def as_svg(picture: Picture) -> bytes:
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
        for number, curve in enumerate(picture.curves):
            _draw(axes, curve, curve.colour or COLOURS[number % len(COLOURS)])
        _style_axes(axes, picture)
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


def _style_axes(axes: Any, picture: Picture) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(picture.x_label)
    axes.set_ylabel(picture.y_label)
    axes.margins(x=0.01)
    if picture.x_label == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xlim(0, 1000)
    values = [np.asarray(curve.points[1]) for curve in picture.curves]
    if picture.logarithmic and all(of_curve.min() > 0 for of_curve in values):
        axes.set_yscale("log")
    elif picture.from_zero:
        axes.set_ylim(0, 1.08 * max(of_curve.max() for of_curve in values) or 1)
    if picture.marked:
        axes.plot(
            picture.marked,
            [0.0] * len(picture.marked),
            "|",
            color="#b3261e",
            markersize=9,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label="skipped",
        )
    if len(picture.curves) > 1 or picture.marked:
        axes.legend(frameon=False, fontsize=8, ncols=3)
