"""The lines of a long file of numbers as columns: eight bytes a step and number."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from stages.train_student.logging.rows import TIMESTEP_BINS, count_rows, each_row

Points = tuple[np.ndarray, np.ndarray]
"""Steps, and a value for each."""

TIMESTEPS = 1000

_NAN = float("nan")
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """One number a line."""

    steps: np.ndarray
    """int64 [N]."""
    values: Mapping[str, np.ndarray]
    """float64 [N] each; NaN where a line has no such number."""

    def __len__(self) -> int:
        return len(self.steps)

    def of(self, name: str) -> np.ndarray:
        """A column; NaN everywhere where no line has it."""
        found = self.values.get(name)
        return np.full(len(self), _NAN) if found is None else found

    def points(self, name: str) -> Points:
        """The lines that have a finite number of that name."""
        return self.finite(self.of(name))

    def finite(self, values: np.ndarray) -> Points:
        """Steps and values of the lines whose value is finite."""
        there = np.isfinite(values)
        return self.steps[there], values[there]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLosses(Columns):
    """What `losses.jsonl` says; an objective's column is called as the objective."""

    objectives: Sequence[str]
    """As they first appear."""
    by_noise: Mapping[str, Mapping[str, Points]]
    """Of the first and of the last quarter of the lines, or of all where they are few: timesteps,
    and each loss's mean over the clips that were seen at about that noise."""


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """The named numbers of every whole line; none where there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    made = _Growing(path, names)
    for rows in _batches(path):
        made.add(rows, rows)
    return Columns(steps=made.steps(), values=made.values())


def read_training_losses(path: Path, names: Sequence[str]) -> TrainingLosses:
    """The same of `losses.jsonl`; lines that a run adds meanwhile are not read.

    Raises:
        ValueError: a line is damaged.
    """
    num_rows = count_rows(path)
    quarter = num_rows // 4
    parts = {"first quarter": MeansByNoise(), "last quarter": MeansByNoise()}
    if not quarter:
        parts = {"all steps": MeansByNoise()}
    first, last = next(iter(parts.values())), list(parts.values())[-1]
    made, auxiliary = _Growing(path, names), _Growing(path, ())
    start = 0
    for rows in _batches(path, num_rows):
        made.add(rows, rows)
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
        steps=made.steps(),
        values=auxiliary.values() | made.values(),
        objectives=auxiliary.names,
        by_noise={part: means.all() for part, means in parts.items()},
    )


def _batches(path: Path, num_rows: int | None = None) -> Iterator[list[dict[str, Any]]]:
    rows = islice(each_row(path), num_rows)
    return iter(lambda: list(islice(rows, _ROWS_AT_ONCE)), [])


class MeansByNoise:
    """Means over all clips in each part of the schedule, each at the part's middle."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        """Clips, and the sum of their losses: [2, parts]."""

    def add(self, by_timestep: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
        """Take in steps: `count` of clips, and the mean of each loss or None, per part."""
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
        """Timesteps and means of each loss, where a clip was seen."""
        width = TIMESTEPS // TIMESTEP_BINS
        middles = np.arange(TIMESTEP_BINS) * width + width // 2
        found = {}
        for name, (clips, total) in self._sums.items():
            seen = clips > 0
            found[name] = (middles[seen], total[seen] / clips[seen])
        return found


def _bins(rows: Iterable[Sequence[float | None]]) -> np.ndarray:
    """[N, bins]; NaN for None."""
    lists = list(rows)
    if any(len(values) != TIMESTEP_BINS for values in lists):
        raise TypeError(f"by_timestep needs {TIMESTEP_BINS} values of each loss")
    return np.array(_as_numbers(list(chain.from_iterable(lists)))).reshape(-1, TIMESTEP_BINS)


def _as_numbers(values: Sequence[float | None]) -> array:
    """NaN for None. Several times as fast as NumPy's own reading of such lists."""
    try:
        return array("d", values)
    except TypeError:
        return array("d", [_NAN if value is None else value for value in values])


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all rows' fields, as they first appear."""
    return list(dict.fromkeys(chain.from_iterable(rows)))


def _damaged(path: Path, rows: Sequence[Mapping[str, Any]], error: Exception) -> ValueError:
    return ValueError(f"{path} has a damaged line at step {rows[0]['step']} or after it: {error!r}")


class _Growing:
    """Columns while their lines are read."""

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
        """Take the steps from `rows`, and the rest from `numbers`."""
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
