"""JSON-lines logs as NumPy columns: eight bytes per value."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from stages.train_student.logging.rows import TIMESTEP_BINS, count_rows, iter_rows

Points = tuple[np.ndarray, np.ndarray]
"""Steps, and a value at each."""

TIMESTEPS = 1000

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
