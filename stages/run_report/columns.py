"""The lines of a long file of numbers as columns: eight bytes a step and number."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stages.train_student.logs.row_file import each_row
from stages.train_student.logs.rows import TIMESTEP_BINS

Points = tuple[np.ndarray, np.ndarray]
"""Steps, and a value for each."""

TIMESTEPS = 1000

_NAN = float("nan")
_ROWS_AT_ONCE = 4096


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
    for row in each_row(path):
        made.add(row["step"], row)
    return Columns(steps=made.steps(), values=made.values())


def read_training_losses(path: Path, names: Sequence[str]) -> TrainingLosses:
    """The same of `losses.jsonl`; lines that a run adds meanwhile are not read.

    Raises:
        ValueError: a line is damaged.
    """
    num_rows = _count_lines(path)
    quarter = num_rows // 4
    parts = {"first quarter": MeansByNoise(), "last quarter": MeansByNoise()}
    if not quarter:
        parts = {"all steps": MeansByNoise()}
    first, last = next(iter(parts.values())), list(parts.values())[-1]
    made, auxiliary = _Growing(path, names), _Growing(path, ())
    for number, row in enumerate(islice(each_row(path), num_rows)):
        made.add(row["step"], row)
        auxiliary.add(row["step"], row.get("auxiliary") or {}, new_names=True)
        if "by_timestep" in row:
            if not quarter or number < quarter:
                first.add(row["by_timestep"])
            elif number >= num_rows - quarter:
                last.add(row["by_timestep"])
    return TrainingLosses(
        steps=made.steps(),
        values=auxiliary.values() | made.values(),
        objectives=auxiliary.names,
        by_noise={part: means.all() for part, means in parts.items()},
    )


class MeansByNoise:
    """Means over all clips in each part of the schedule, each at the part's middle."""

    def __init__(self) -> None:
        self._rows: list[Mapping[str, Sequence[float | None]]] = []
        self._sums: dict[str, np.ndarray] = {}
        """Clips, and the sum of their losses: [2, parts]."""

    def add(self, by_timestep: Mapping[str, Sequence[float | None]]) -> None:
        """Take in a step: `count` of clips, and the mean of each loss or None, per part."""
        self._rows.append(by_timestep)
        if len(self._rows) == _ROWS_AT_ONCE:
            self._sum_up()

    def all(self) -> dict[str, Points]:
        """Timesteps and means of each loss, where a clip was seen."""
        self._sum_up()
        width = TIMESTEPS // TIMESTEP_BINS
        middles = np.arange(TIMESTEP_BINS) * width + width // 2
        found = {}
        for name, (clips, total) in self._sums.items():
            seen = clips > 0
            found[name] = (middles[seen], total[seen] / clips[seen])
        return found

    def _sum_up(self) -> None:
        for name in dict.fromkeys(name for row in self._rows for name in row if name != "count"):
            rows = [row for row in self._rows if name in row]
            clips_NP = np.array([row["count"] for row in rows], float)
            mean_NP = np.array([row[name] for row in rows], float)
            clips_NP[np.isnan(mean_NP)] = 0
            sums = [clips_NP.sum(0), (clips_NP * np.nan_to_num(mean_NP)).sum(0)]
            self._sums[name] = self._sums.get(name, np.zeros((2, TIMESTEP_BINS))) + sums
        self._rows = []


class _Growing:
    """Columns while their lines are read."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._steps = array("q")
        self._columns = {name: array("d") for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def add(self, step: int, row: Mapping[str, Any], *, new_names: bool = False) -> None:
        if new_names:
            for name in [name for name in row if name not in self._columns]:
                self._columns[name] = array("d", [_NAN]) * len(self._steps)
        try:
            self._steps.append(int(step))
            for name, column in self._columns.items():
                value = row.get(name)
                column.append(_NAN if value is None else value)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{self._path} has a damaged line: {error}: {row!r:.80}") from error

    def steps(self) -> np.ndarray:
        return np.array(self._steps, np.int64)

    def values(self) -> dict[str, np.ndarray]:
        return {name: np.array(column) for name, column in self._columns.items()}


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
