"""Records of a run, read from its folder; the run may still be in progress.

Only `run.json` is required. Incomplete lines of `*.jsonl` are skipped. The losses and the
performance of every step are NumPy columns: eight bytes per value.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from stages.files.text import read_object, read_text
from stages.files.yaml import MAX_FILE_BYTES, YamlError, parse_yaml
from stages.train_student.checkpoints.best import BestCheckpoint, read_best
from stages.train_student.logging.rows import (
    CONFIG_FILE,
    DAMAGED_FILE,
    LOSSES_FILE,
    PERFORMANCE_FILE,
    SKIPPED_FILE,
    TIMESTEP_BINS,
    DamagedRow,
    SkippedRow,
    ValidationRow,
    count_rows,
    iter_records,
    iter_rows,
)

Row = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]
"""Steps, and a value at each."""
TIMESTEPS = 1000
VALIDATION_FILE = "validation.jsonl"
"""One line per validation."""

_LOSSES = ("loss", "diffusion", "grad_norm", "lr")
_PERFORMANCE = (
    "seconds",
    "wait_seconds",
    "clips_per_second",
    "peak_memory_bytes",
    "share_of_peak",
)

SAMPLES_RECORD = "samples.json"
"""Written last into each folder under samples/; marks the samples as complete."""

_NAN = float("nan")
_BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Numeric columns of a JSON-lines file, one row per line."""

    steps: np.ndarray
    """int64 [N]."""
    values: Mapping[str, np.ndarray]
    """Name -> float64 [N]; NaN where a line has no such field."""

    def __len__(self) -> int:
        return len(self.steps)

    def of(self, name: str) -> np.ndarray:
        """A column; all NaN if no line has it."""
        found = self.values.get(name)
        return np.full(len(self), _NAN) if found is None else found

    def points(self, name: str) -> Points:
        """Steps and values of a column, where it is finite."""
        return self.finite(self.of(name))

    def finite(self, values: np.ndarray) -> Points:
        """Steps and values, where `values` [N] is finite."""
        there = np.isfinite(values)
        return self.steps[there], values[there]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLosses(Columns):
    """Columns of `losses.jsonl`; auxiliary losses are under their objectives' names."""

    objectives: Sequence[str]
    """In order of first appearance."""
    by_noise: Mapping[str, Mapping[str, Points]]
    """Part of the run (first and last quarter, or all steps of a short run) -> loss name ->
    timesteps, and mean loss of the clips near each timestep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleVideo:
    """One sample video."""

    step: int
    prompt: str
    file: Path
    settings: Row
    """Denoising steps, guidance, seed, frames per second."""
    scores: Row
    """Scores by name; None where the video does not allow one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecords:
    """All records shown on the report page."""

    run_dir: Path
    about: Row
    """run.json: settings, provenance, stores, excluded and held-out clips."""
    config_yaml: str
    """Settings of the last start of the run, as YAML text."""
    config: Row
    """The parsed `config_yaml`."""
    losses: TrainingLosses
    performance: Columns
    validation: list[Row]
    skipped: list[Row]
    damaged: list[Row]
    samples: list[SampleVideo]
    """In order of steps, then of prompts."""
    checkpoints: list[int]
    best: BestCheckpoint | None
    """As recorded; its checkpoint may be gone."""
    finished: bool

    @property
    def planned_steps(self) -> int | None:
        """`train.steps`, if the settings have it."""
        steps = (self.config.get("train") or {}).get("steps")
        return None if steps is None else int(steps)

    @property
    def steps_done(self) -> int:
        """The last step with logged losses."""
        return int(self.losses.steps[-1]) if len(self.losses) else 0


def read_run(run_dir: Path) -> RunRecords:
    """Read the folder of a run.

    Raises:
        ValueError: it is not the folder of a run, or a file is damaged.
    """
    file = run_dir / "run.json"
    if not file.is_file():
        raise ValueError(
            f"{run_dir} holds no training run (no run.json); name one with --run, or train one "
            "with sam2vx-pipeline train"
        )
    config = run_dir / CONFIG_FILE
    config_yaml = read_text(config, MAX_FILE_BYTES) if config.is_file() else ""
    try:
        settings = parse_yaml(config_yaml) or {}
    except YamlError as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(name) or {}, dict) for name in ("train", "model")
    ):
        raise ValueError(f"{config} does not hold the settings of a run")
    train = settings.get("train") or {}
    for name, kind in (("steps", int), ("method", str), ("objectives", list)):
        if not isinstance(train.get(name, kind()), kind):
            raise ValueError(
                f"{config}: train.{name} is {train[name]!r:.80}, expected {kind.__name__}"
            )
    if not all(isinstance(name, str) for name in train.get("objectives", ())):
        raise ValueError(f"{config}: train.objectives must be a list of names")
    return RunRecords(
        run_dir=run_dir,
        about=read_object(file),
        config_yaml=config_yaml,
        config=settings,
        losses=read_training_losses(run_dir / LOSSES_FILE, _LOSSES),
        performance=read_columns(run_dir / PERFORMANCE_FILE, _PERFORMANCE),
        validation=[asdict(row) for row in iter_records(run_dir / VALIDATION_FILE, ValidationRow)],
        skipped=[asdict(row) for row in iter_records(run_dir / SKIPPED_FILE, SkippedRow)],
        damaged=[asdict(row) for row in iter_records(run_dir / DAMAGED_FILE, DamagedRow)],
        samples=read_samples(run_dir),
        checkpoints=sorted(
            int(path.name.split(".")[0].removeprefix("checkpoint-"))
            for path in (run_dir / "checkpoints").glob("checkpoint-*.complete.json")
        ),
        best=read_best(run_dir),
        finished=(run_dir / "finished.json").is_file(),
    )


def points(rows: Iterable[Row], value: Callable[[Row], Any]) -> Points:
    """Steps and values of the rows whose value is finite."""
    steps, values = [], []
    for row in rows:
        found = value(row)
        if found is not None and math.isfinite(found):
            steps.append(int(row["step"]))
            values.append(float(found))
    return np.array(steps, np.int64), np.array(values)


def objectives(rows: Iterable[Row]) -> list[str]:
    """Names of the auxiliary losses in the rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get("auxiliary") or {}))


def loss_of(name: str) -> Callable[[Row], float | None]:
    """Getter of a loss in a validation row: `diffusion`, or an objective's name."""
    return lambda row: row["diffusion"] if name == "diffusion" else row["auxiliary"].get(name)


def read_samples(run_dir: Path) -> list[SampleVideo]:
    """Read the records of all complete samples, in order of steps, then of prompts.

    Raises:
        ValueError: a record is damaged.
    """
    found = []
    for record in sorted((run_dir / "samples").glob(f"step-*/{SAMPLES_RECORD}")):
        settings = read_object(record, step=int, prompts=list, denoising_steps=int, seed=int)
        prompts = settings.pop("prompts")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{record} is damaged: prompts must be a list of texts")
        if type(settings.get("guidance")) not in (int, float):
            raise ValueError(f"{record} is damaged: guidance is {settings.get('guidance')!r:.80}")
        scores = settings.pop("scores", [{}] * len(prompts))
        if not _are_scores(scores, len(prompts)):
            raise ValueError(f"{record} is damaged: scores must be an object of numbers per prompt")
        found += [
            SampleVideo(
                step=settings["step"],
                prompt=prompt,
                file=record.with_name(f"{number}.mp4"),
                settings=settings,
                scores=scores[number],
            )
            for number, prompt in enumerate(prompts)
        ]
    return sorted(found, key=lambda sample: sample.step)


def _are_scores(scores: Any, count: int) -> bool:
    return (
        isinstance(scores, list)
        and len(scores) == count
        and all(
            isinstance(of_video, dict)
            and all(value is None or type(value) is float for value in of_video.values())
            for of_video in scores
        )
    )


def mean_scores(scores: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of each score over the videos that have it."""
    values: dict[str, list[float]] = {}
    for of_video in scores:
        for name, value in of_video.items():
            if value is not None and not math.isnan(value):
                values.setdefault(name, []).append(value)
    return {name: math.fsum(known) / len(known) for name, known in values.items()}


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """Read the named fields of all complete lines; empty if there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    columns = _ColumnBuilder(path, names)
    for rows in _batches(path):
        columns.add(rows, rows)
    return Columns(steps=columns.steps(), values=columns.values())


def read_training_losses(path: Path, names: Sequence[str]) -> TrainingLosses:
    """Read `losses.jsonl`; lines that a run appends meanwhile are not read.

    Raises:
        ValueError: a line is damaged.
    """
    num_rows = count_rows(path)
    quarter = num_rows // 4
    parts = {"first quarter": MeansByNoise(), "last quarter": MeansByNoise()}
    if not quarter:
        parts = {"all steps": MeansByNoise()}
    first, last = next(iter(parts.values())), list(parts.values())[-1]
    columns, auxiliary = _ColumnBuilder(path, names), _ColumnBuilder(path, ())
    start = 0
    for rows in _batches(path, num_rows):
        columns.add(rows, rows)
        try:
            auxiliary.add(rows, [row.get("auxiliary") or {} for row in rows], new_names=True)
            by_timestep = [row.get("by_timestep") or {} for row in rows]
            first.add(by_timestep[: max(quarter - start, 0)] if quarter else by_timestep)
            if quarter:
                last.add(by_timestep[max(num_rows - quarter - start, 0) :])
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise _damaged(path, rows, error) from error
        start += len(rows)
    return TrainingLosses(
        steps=columns.steps(),
        values=auxiliary.values() | columns.values(),
        objectives=auxiliary.names,
        by_noise={part: means.all() for part, means in parts.items()},
    )


def _batches(path: Path, num_rows: int | None = None) -> Iterator[list[dict[str, Any]]]:
    rows = islice(iter_rows(path), num_rows)
    return iter(lambda: list(islice(rows, _BATCH_ROWS)), [])


class MeansByNoise:
    """Mean losses in each timestep bin, at the middle of the bin."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        """Loss -> number of clips, and sum of their losses: [2, bins]."""

    def add(self, by_timestep: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
        """Add steps: `count` of clips, and the mean of each loss or None, per bin."""
        for name in _names(by_timestep):
            if name == "count":
                continue
            rows = [row for row in by_timestep if name in row]
            clips_NP = _bins(row["count"] for row in rows)
            mean_NP = _bins(row[name] for row in rows)
            clips_NP[np.isnan(mean_NP)] = 0
            sums = [clips_NP.sum(0), (clips_NP * np.nan_to_num(mean_NP)).sum(0)]
            self._sums[name] = self._sums.get(name, np.zeros((2, TIMESTEP_BINS))) + sums

    def all(self) -> dict[str, Points]:
        """Loss -> timesteps and means of the bins with clips."""
        width = TIMESTEPS // TIMESTEP_BINS
        middles = np.arange(TIMESTEP_BINS) * width + width // 2
        found = {}
        for name, (clips, total) in self._sums.items():
            nonempty = clips > 0
            found[name] = (middles[nonempty], total[nonempty] / clips[nonempty])
        return found


def _bins(rows: Iterable[Sequence[float | None]]) -> np.ndarray:
    """[N, bins]; NaN for None."""
    lists = list(rows)
    if any(len(values) != TIMESTEP_BINS for values in lists):
        raise TypeError(f"by_timestep must have {TIMESTEP_BINS} values of each loss")
    return np.array(_as_numbers(list(chain.from_iterable(lists)))).reshape(-1, TIMESTEP_BINS)


def _as_numbers(values: Sequence[float | None]) -> array:
    """NaN for None. Several times as fast as `np.array` on such lists."""
    try:
        return array("d", values)
    except TypeError:
        return array("d", [_NAN if value is None else value for value in values])


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Field names of all rows, in order of first appearance."""
    return list(dict.fromkeys(chain.from_iterable(rows)))


def _damaged(path: Path, rows: Sequence[Mapping[str, Any]], error: Exception) -> ValueError:
    return ValueError(f"{path} has a damaged line at step {rows[0]['step']} or after it: {error!r}")


class _ColumnBuilder:
    """Builds columns row by row."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._steps = array("q")
        self._columns = {name: array("d") for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        numbers: Sequence[Mapping[str, Any]],
        *,
        new_names: bool = False,
    ) -> None:
        """Append the steps of `rows` and the fields of `numbers`."""
        if new_names:
            for name in _names(numbers):
                if name not in self._columns:
                    self._columns[name] = array("d", [_NAN]) * len(self._steps)
        try:
            self._steps.extend([row["step"] for row in rows])
            for name, column in self._columns.items():
                column.extend(_as_numbers([row.get(name) for row in numbers]))
        except (TypeError, OverflowError) as error:
            raise _damaged(self._path, rows, error) from error

    def steps(self) -> np.ndarray:
        return np.array(self._steps, np.int64)

    def values(self) -> dict[str, np.ndarray]:
        return {name: np.array(column) for name, column in self._columns.items()}
