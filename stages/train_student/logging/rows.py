"""Log rows of a run, and their JSON-lines files; every row has a `step`."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from cache_schema.atomic_io import add_path_to_errors, write_atomic

Row = TypeVar("Row")

_MAX_LINE_BYTES = 64 << 20
"""Limit for one line; the longest are skipped steps, which list every clip of every rank."""


def iter_records(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Iterate over all complete lines, as the dataclass `kind` that they were written from.

    Raises:
        ValueError: a line is damaged, or its fields differ from those of the dataclass.
    """
    adapter = TypeAdapter(kind)
    for line in _complete_lines(path):
        _parse(line, path)
        try:
            yield adapter.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            found = "" if first["type"] == "missing" else f" is {first['input']!r:.80}"
            raise ValueError(
                f"{path} has a damaged line: {name}{found} ({first['msg']})"
            ) from error


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over all complete lines; the file of a long run is too large to load at once.

    Raises:
        ValueError: a line is damaged.
    """
    return (_parse(line, path) for line in _complete_lines(path))


def count_rows(path: Path) -> int:
    """Count the complete lines; 0 if there is no file."""
    return sum(1 for _ in _complete_lines(path))


class RowFile:
    """JSON-lines file that rows are appended to during a run."""

    def __init__(self, path: Path, steps_done: int, check: Callable[[], None]) -> None:
        """Open the file, and truncate rows that an interrupted run wrote after `steps_done` steps.

        Args:
            check: called before each change to the file; raises if another process may own it.

        Raises:
            ValueError: a line is damaged, or steps are not in ascending order.
        """
        self._check = check
        if not path.is_file():
            check()
            write_atomic(path, b"")
        kept_bytes = _bytes_until(path, steps_done)
        if kept_bytes < path.stat().st_size:
            check()
            os.truncate(path, kept_bytes)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats are written so that they are read back exactly."""
        self._check()
        with add_path_to_errors(self._path):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Sync the rows to disk, so that they survive a power failure."""
        with add_path_to_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _bytes_until(path: Path, steps_done: int) -> int:
    """Size of the file up to the last line of `steps_done` or an earlier step."""
    kept_bytes, last = 0, None
    for line in _complete_lines(path):
        step = _parse(line, path)["step"]
        if last is not None and step < last:
            raise ValueError(
                f"{path} has a line of step {step} after one of step {last}: two runs wrote to it; "
                "restore it, or choose another train.run_dir"
            )
        last = step
        kept_bytes += len(line) if step <= steps_done else 0
    return kept_bytes


def _complete_lines(path: Path) -> Iterator[bytes]:
    """Lines with their newlines; an incomplete last line is omitted."""
    if path.is_file():
        with path.open("rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
                yield line
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(f"{path} has a line of more than {_MAX_LINE_BYTES:,} bytes")


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        # Several times as fast as json.loads.
        row: dict[str, Any] = from_json(line, allow_inf_nan=False)
        if type(row["step"]) is not int or not 0 <= row["step"] < 2**63:
            raise ValueError(f"step is {row['step']!r:.80}, not a step number")
    except (ValueError, TypeError, KeyError) as error:
        start = line[:80].decode("utf-8", "backslashreplace").rstrip("\n")
        raise ValueError(f"{path} has a damaged line: {start!r} ({error})") from error
    return row


CONFIG_FILE = "config.yaml"
"""Settings of the last start of a run."""
LOSSES_FILE = "losses.jsonl"
PERFORMANCE_FILE = "performance.jsonl"
SKIPPED_FILE = "skipped_steps.jsonl"
DAMAGED_FILE = "damaged_clips.jsonl"

TIMESTEP_BINS = 10
"""Number of equal bins of the schedule's timesteps in `by_timestep`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRow:
    """Means of one optimiser step over the batch; independent of timing and number of ranks."""

    step: int
    """From 1: the number of steps done, including this one."""
    loss: float
    diffusion: float
    auxiliary: dict[str, float]
    """Objective name -> loss before weighting; empty for plain fine-tuning."""
    grad_norm: float
    """Before clipping."""
    lr: float
    by_timestep: dict[str, list[float | None]]
    """Lists of ten values, ordered from least to most noise: `count` of clips, and the means of
    `diffusion` and of every objective, null for bins without clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceRow:
    """Time and memory of a step: maxima over the ranks."""

    step: int
    seconds: float
    wait_seconds: float
    """Part of `seconds` spent waiting for the data loader."""
    clips_per_second: float
    peak_memory_bytes: int
    """Since the process started; of the GPU if there is one, otherwise of the process."""
    share_of_peak: float | None
    """Model FLOP/s, without recomputation, divided by the GPU's peak (MFU); null if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedClip:
    """One clip of a skipped step."""

    key: str
    timestep: int
    diffusion: float | str
    """NaN and infinite values as text, since JSON has no such numbers."""
    auxiliary: dict[str, float | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRow:
    """A step whose update was skipped."""

    step: int
    what: str
    """What was NaN or infinite: `loss` or `gradient`."""
    clips: tuple[SkippedClip, ...]
    """Clips of all ranks."""

    def suspects(self) -> list[str]:
        """Keys of the clips with a NaN or infinite loss; of all clips if there are none."""
        bad = [
            clip.key
            for clip in self.clips
            if any(isinstance(value, str) for value in (clip.diffusion, *clip.auxiliary.values()))
        ]
        return sorted(set(bad or [clip.key for clip in self.clips]))


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRow:
    """A clip that could not be read, and was replaced by another."""

    step: int
    key: str
    message: str
    gone: bool
    """Whether it was dropped from the cache, or extracted again, during the run, not damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRow:
    """A line of validation.jsonl: means over the held-out clips; null if NaN or infinite."""

    step: int
    """Steps done; 0 is the model before training."""
    clips: int
    """Number of clips that could be read."""
    diffusion: float | None
    """Mean over all timesteps."""
    auxiliary: dict[str, float | None]
    """Objective name -> loss before weighting."""
    by_timestep: dict[str, list[float | None]]
    """Lists of equal length: `timestep`, `diffusion`, and every objective."""

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.by_timestep.values()}
        if {"timestep", "diffusion", *self.auxiliary} - self.by_timestep.keys() or len(lengths) > 1:
            raise ValueError("by_timestep needs a value of every loss for each timestep")
        if None in self.by_timestep["timestep"]:
            raise ValueError("by_timestep.timestep must not hold null")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """All log rows of one step."""

    performance: PerformanceRow
    losses: LossRow | None
    """None for a skipped step."""
    skipped: SkippedRow | None
    damaged: tuple[DamagedRow, ...]


def read_losses(run_dir: Path) -> Iterator[LossRow]:
    """Iterate over the rows of a run's losses.jsonl; none if there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    return iter_records(run_dir / LOSSES_FILE, LossRow)
