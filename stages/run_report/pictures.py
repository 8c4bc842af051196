"""Which curves the page of a run shows, by section; each is left out where a run has no numbers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stages.run_report.curves import COLOURS, Curve, Picture
from stages.run_report.records import Points, Row, RunRecords, loss_of, objectives, points

_TIMESTEPS = 1000

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
    for number, name in enumerate(objectives(run.losses)):
        pictures.append(
            _picture(
                _title(name),
                "Auxiliary loss, before weighting.",
                [_curve(run.losses, loss_of(name), _title(name), COLOURS[1 + number % 4])],
                y_label="loss",
            )
        )
    pictures += [
        _by_noise(run, "diffusion", "Diffusion loss by timestep"),
        *(_by_noise(run, name, f"{_title(name)} by timestep") for name in objectives(run.losses)),
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
            [_curve(run.losses, lambda row: row["lr"], "rate", exact=True)],
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
        curve = _curve(run.validation, loss_of(name), _title(name), COLOURS[number % 5], dots=True)
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
    seconds = _curve(rows, lambda row: row.get("seconds"), "step")
    waiting = _curve(rows, lambda row: row.get("wait_seconds"), "of it waiting for data")
    share = _curve(rows, _percent("share_of_peak"), "share")
    wait_share = _curve(rows, _wait_percent, "share", COLOURS[1])
    memory = _curve(rows, lambda row: _scaled(row.get("peak_memory_bytes"), 1e-9), "memory")
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
    rows: Iterable[Row], name: str, title: str, caption: str, marked: Sequence[int] = (), **how: Any
) -> Picture:
    curve = _curve(rows, lambda row: row.get(name), title)
    how = {"y_label": "loss"} | how
    return Picture(title=title, caption=caption, curves=[curve], marked=marked, **how)


def _picture(title: str, caption: str, curves: Sequence[Curve], **how: Any) -> Picture:
    return Picture(title=title, caption=caption, curves=[c for c in curves if c.points[0]], **how)


def _curve(
    rows: Iterable[Row],
    value: Callable[[Row], Any],
    label: str,
    colour: str | None = None,
    **how: bool,
) -> Curve:
    return Curve(label=label, points=points(rows, value), colour=colour, **how)


def _with_numbers(pictures: Iterable[Picture]) -> list[Picture]:
    return [p for p in pictures if any(curve.points[0] for curve in p.curves)]


def _by_noise(run: RunRecords, name: str, title: str) -> Picture:
    """The mean of each range of timesteps, over the first and the last quarter of the steps."""
    rows = run.losses
    quarter = len(rows) // 4
    parts = {"first quarter": rows[:quarter], "last quarter": rows[-quarter:]}
    if not quarter:
        parts = {"all steps": rows}
    curves = [
        Curve(label=label, points=mean_over_bins(part, name), dots=True)
        for label, part in parts.items()
    ]
    caption = "Training clips, by the noise they were seen at: 999 is nothing but noise."
    return _picture(title, caption, curves, y_label="loss", x_label="timestep")


def mean_over_bins(rows: Sequence[Row], name: str) -> Points:
    """The mean over the clips of all rows in each part of the schedule, at the part's middle.

    Args:
        rows: those of losses.jsonl.
        name: `diffusion` or an objective.
    """
    sums: dict[int, float] = {}
    clips: dict[int, float] = {}
    for row in rows:
        counts, means = row["by_timestep"]["count"], row["by_timestep"][name]
        width = _TIMESTEPS // len(counts)
        for number, (count, mean) in enumerate(zip(counts, means, strict=True)):
            if mean is not None:
                middle = number * width + width // 2
                sums[middle] = sums.get(middle, 0.0) + count * mean
                clips[middle] = clips.get(middle, 0.0) + count
    middles = sorted(sums)
    return middles, [sums[middle] / clips[middle] for middle in middles]


def _over_timesteps(row: Row, name: str) -> Points:
    found = row["by_timestep"]
    pairs = [(t, v) for t, v in zip(found["timestep"], found[name], strict=True) if v is not None]
    return [t for t, _ in pairs], [v for _, v in pairs]


def _first_and_last(rows: Sequence[Row]) -> list[Row]:
    return [rows[0], rows[-1]] if len(rows) > 1 else list(rows)


def _wait_percent(row: Row) -> float | None:
    seconds, wait = row.get("seconds"), row.get("wait_seconds")
    return 100.0 * wait / seconds if seconds and wait is not None else None


def _percent(name: str) -> Callable[[Row], float | None]:
    return lambda row: _scaled(row.get(name), 100.0)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _title(name: str) -> str:
    return _TITLES.get(name, name)
