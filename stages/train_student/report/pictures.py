"""Plots of the report page, by section; plots without data are omitted."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stages.train_student.report.columns import Columns, Points
from stages.train_student.report.curves import COLOURS, Curve, Picture
from stages.train_student.report.records import Row, RunRecords, loss_of, objectives, points

_TITLES = {
    "diffusion": "Diffusion loss",
    "lgf": "Local Gram Flow",
    "repa": "REPA",
    "token-relation": "Token relations",
    "mask": "Mask",
}


def training_pictures(run: RunRecords) -> list[Picture]:
    """Losses, losses by timestep, gradient norm and learning rate."""
    marked = tuple(int(row["step"]) for row in run.skipped)
    pictures = [
        _plot_column(
            run.losses,
            "loss",
            "Total loss",
            "Sum of the diffusion loss and the weighted auxiliary losses.",
            marked,
        ),
        _plot_column(
            run.losses, "diffusion", "Diffusion loss", "Mean squared error of the velocity."
        ),
    ]
    for number, name in enumerate(run.losses.objectives):
        pictures.append(
            _plot(
                _title(name),
                "Auxiliary loss, before weighting.",
                [_curve(run.losses.points(name), _title(name), COLOURS[1 + number % 4])],
                y_label="loss",
            )
        )
    pictures += [
        _by_noise(run, "diffusion", "Diffusion loss by timestep"),
        *(_by_noise(run, name, f"{_title(name)} by timestep") for name in run.losses.objectives),
        _plot_column(
            run.losses,
            "grad_norm",
            "Norm of the gradient",
            "Before clipping.",
            y_label="norm",
            logarithmic=True,
        ),
        _plot(
            "Learning rate",
            "At each step.",
            [_curve(run.losses.points("lr"), "rate", exact=True)],
            y_label="rate",
            from_zero=True,
        ),
    ]
    return _non_empty(pictures)


def validation_pictures(run: RunRecords) -> list[Picture]:
    """Losses on held-out clips, over the run and by timestep."""
    pictures = []
    names = ("diffusion", *objectives(run.validation))
    for number, name in enumerate(names):
        found = points(run.validation, loss_of(name))
        curve = _curve(found, _title(name), COLOURS[number % 5], dots=True)
        pictures.append(
            _plot(_title(name), "On held-out clips, fixed noise.", [curve], y_label="loss")
        )
    for name in names:
        curves = [
            Curve(label=f"step {row['step']}", points=_over_timesteps(row, name), dots=True)
            for row in _first_and_last(run.validation)
        ]
        pictures.append(
            _plot(
                f"{_title(name)} by timestep",
                "On held-out clips: timestep 0 is almost no noise, 999 is pure noise.",
                curves,
                y_label="loss",
                x_label="timestep",
            )
        )
    return _non_empty(pictures)


def speed_pictures(run: RunRecords) -> list[Picture]:
    """Step time, wait for data, share of the GPUs' peak FLOP/s, and memory."""
    rows = run.performance
    seconds = _curve(rows.points("seconds"), "step")
    waiting = _curve(rows.points("wait_seconds"), "waiting for data")
    share = _curve(rows.finite(100 * rows.of("share_of_peak")), "share")
    timed = np.where(rows.of("seconds") > 0, rows.of("seconds"), np.nan)
    wait_share = _curve(rows.finite(100 * rows.of("wait_seconds") / timed), "share", COLOURS[1])
    memory = _curve(rows.finite(rows.of("peak_memory_bytes") / 1e9), "memory")
    return _non_empty(
        [
            _plot(
                "Seconds a step",
                "The whole step, and the part of it spent waiting for the loader.",
                [seconds, waiting],
                y_label="seconds",
                from_zero=True,
            ),
            _plot(
                "Share of the step spent waiting for data",
                "Above a few per cent, more train.loader_workers or a faster disk may help.",
                [wait_share],
                y_label="per cent",
                from_zero=True,
            ),
            _plot(
                "Share of the GPUs' peak",
                "Model FLOP/s, without recomputation, relative to the GPUs' peak.",
                [share],
                y_label="per cent",
                from_zero=True,
            ),
            _plot(
                "Peak memory",
                "Of rank 0's GPU, or of its process without one.",
                [memory],
                y_label="GB",
                from_zero=True,
            ),
        ]
    )


def _plot_column(
    rows: Columns, name: str, title: str, caption: str, marked: Sequence[int] = (), **how: Any
) -> Picture:
    curve = _curve(rows.points(name), title)
    how = {"y_label": "loss"} | how
    return Picture(title=title, caption=caption, curves=[curve], marked=marked, **how)


def _plot(title: str, caption: str, curves: Sequence[Curve], **how: Any) -> Picture:
    return Picture(
        title=title, caption=caption, curves=[c for c in curves if len(c.points[0])], **how
    )


def _curve(points: Points, label: str, colour: str | None = None, **how: bool) -> Curve:
    return Curve(label=label, points=points, colour=colour, **how)


def _non_empty(pictures: Iterable[Picture]) -> list[Picture]:
    return [p for p in pictures if any(len(curve.points[0]) for curve in p.curves)]


def _by_noise(run: RunRecords, name: str, title: str) -> Picture:
    """Mean loss of each timestep bin, over the first and the last quarter of the steps."""
    curves = [
        Curve(label=part, points=means[name], dots=True)
        for part, means in run.losses.by_noise.items()
        if name in means
    ]
    caption = "Training clips, by their timestep: 999 is pure noise."
    return _plot(title, caption, curves, y_label="loss", x_label="timestep")


def _over_timesteps(row: Row, name: str) -> Points:
    found = row["by_timestep"]
    pairs = [(t, v) for t, v in zip(found["timestep"], found[name], strict=True) if v is not None]
    return np.array([t for t, _ in pairs]), np.array([v for _, v in pairs])


def _first_and_last(rows: Sequence[Row]) -> list[Row]:
    return [rows[0], rows[-1]] if len(rows) > 1 else list(rows)


def _title(name: str) -> str:
    return _TITLES.get(name, name)
