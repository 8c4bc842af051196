"""Which curves the page of a run shows, by section; each is left out where a run has no numbers."""

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
    """The parts of the loss, the gradient's norm, the rate, and the loss at each noise."""
    marked = tuple(int(row["step"]) for row in run.skipped)
    pictures = [
        _one(run.losses, "loss", "Total loss", "What is minimised.", marked),
        _one(run.losses, "diffusion", "Diffusion loss", "Mean squared error of the velocity."),
    ]
    for number, name in enumerate(run.losses.objectives):
        pictures.append(
            _picture(
                _title(name),
                "Auxiliary loss, before weighting.",
                [_curve(run.losses.points(name), _title(name), COLOURS[1 + number % 4])],
                y_label="loss",
            )
        )
    pictures += [
        _by_noise(run, "diffusion", "Diffusion loss by timestep"),
        *(_by_noise(run, name, f"{_title(name)} by timestep") for name in run.losses.objectives),
        _one(
            run.losses,
            "grad_norm",
            "Norm of the gradient",
            "Before clipping.",
            y_label="norm",
            logarithmic=True,
        ),
        _picture(
            "Learning rate",
            "As it was used.",
            [_curve(run.losses.points("lr"), "rate", exact=True)],
            y_label="rate",
            from_zero=True,
        ),
    ]
    return _with_numbers(pictures)


def validation_pictures(run: RunRecords) -> list[Picture]:
    """Losses on clips that were held out, over the run and at each noise."""
    pictures = []
    named = ("diffusion", *objectives(run.validation))
    for number, name in enumerate(named):
        found = points(run.validation, loss_of(name))
        curve = _curve(found, _title(name), COLOURS[number % 5], dots=True)
        pictures.append(
            _picture(_title(name), "On held-out clips, fixed noise.", [curve], y_label="loss")
        )
    for name in named:
        curves = [
            Curve(label=f"step {row['step']}", points=_over_timesteps(row, name), dots=True)
            for row in _first_and_last(run.validation)
        ]
        pictures.append(
            _picture(
                f"{_title(name)} by timestep",
                "On held-out clips: 0 is almost no noise, 999 nothing but noise.",
                curves,
                y_label="loss",
                x_label="timestep",
            )
        )
    return _with_numbers(pictures)


def speed_pictures(run: RunRecords) -> list[Picture]:
    """Seconds a step and how many of them were waiting, memory, and the share of the peak."""
    rows = run.performance
    seconds = _curve(rows.points("seconds"), "step")
    waiting = _curve(rows.points("wait_seconds"), "of it waiting for data")
    share = _curve(rows.finite(100 * rows.of("share_of_peak")), "share")
    timed = np.where(rows.of("seconds") > 0, rows.of("seconds"), np.nan)
    wait_share = _curve(rows.finite(100 * rows.of("wait_seconds") / timed), "share", COLOURS[1])
    memory = _curve(rows.finite(rows.of("peak_memory_bytes") / 1e9), "memory")
    return _with_numbers(
        [
            _picture(
                "Seconds a step",
                "The whole step, and the part of it spent waiting for the loader.",
                [seconds, waiting],
                y_label="seconds",
                from_zero=True,
            ),
            _picture(
                "Share of the step spent waiting for data",
                "Above a few per cent, more train.loader_workers or a faster disk may help.",
                [wait_share],
                y_label="per cent",
                from_zero=True,
            ),
            _picture(
                "Share of the GPUs' peak",
                "Arithmetic of the model against what the GPUs could do.",
                [share],
                y_label="per cent",
                from_zero=True,
            ),
            _picture(
                "Peak memory",
                "Of rank 0's GPU, or of its process without one.",
                [memory],
                y_label="GB",
                from_zero=True,
            ),
        ]
    )


def _one(
    rows: Columns, name: str, title: str, caption: str, marked: Sequence[int] = (), **how: Any
) -> Picture:
    curve = _curve(rows.points(name), title)
    how = {"y_label": "loss"} | how
    return Picture(title=title, caption=caption, curves=[curve], marked=marked, **how)


def _picture(title: str, caption: str, curves: Sequence[Curve], **how: Any) -> Picture:
    return Picture(
        title=title, caption=caption, curves=[c for c in curves if len(c.points[0])], **how
    )


def _curve(points: Points, label: str, colour: str | None = None, **how: bool) -> Curve:
    return Curve(label=label, points=points, colour=colour, **how)


def _with_numbers(pictures: Iterable[Picture]) -> list[Picture]:
    return [p for p in pictures if any(len(curve.points[0]) for curve in p.curves)]


def _by_noise(run: RunRecords, name: str, title: str) -> Picture:
    """The mean of each range of timesteps, over the first and the last quarter of the steps."""
    curves = [
        Curve(label=part, points=means[name], dots=True)
        for part, means in run.losses.by_noise.items()
        if name in means
    ]
    caption = "Training clips, by the noise they were seen at: 999 is nothing but noise."
    return _picture(title, caption, curves, y_label="loss", x_label="timestep")


def _over_timesteps(row: Row, name: str) -> Points:
    found = row["by_timestep"]
    pairs = [(t, v) for t, v in zip(found["timestep"], found[name], strict=True) if v is not None]
    return np.array([t for t, _ in pairs]), np.array([v for _, v in pairs])


def _first_and_last(rows: Sequence[Row]) -> list[Row]:
    return [rows[0], rows[-1]] if len(rows) > 1 else list(rows)


def _title(name: str) -> str:
    return _TITLES.get(name, name)
