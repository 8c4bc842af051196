"""Rows that a run logs, and their files: one JSON object per line, each with its `step`."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from cache_schema.atomic_io import naming, write_whole

Row = TypeVar("Row")

_MAX_LINE_BYTES = 64 << 20
"""Of a skipped step's line, which names every clip of every rank."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole line; empty where there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    return list(each_row(path))


def each_of(path: Path, kind: type[Row]) -> Iterator[Row]:
    """The same as the dataclass that the lines were written from.

    Raises:
        ValueError: a line is damaged, or has other fields than the dataclass.
    """
    adapter = TypeAdapter(kind)
    for line in _whole_lines(path):
        _parsed(line, path)
        try:
            yield adapter.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            is_there = "" if first["type"] == "missing" else f" is {first['input']!r:.80}"
            raise ValueError(
                f"{path} has a damaged line: {name}{is_there} ({first['msg']})"
            ) from error


def each_row(path: Path) -> Iterator[dict[str, Any]]:
    """The same, a line at a time: a long run's file is larger than memory should be."""
    return (_parsed(line, path) for line in _whole_lines(path))


def count_rows(path: Path) -> int:
    """How many whole lines there are; 0 where there is no file."""
    return sum(1 for _ in _whole_lines(path))


class RowFile:
    """Appends rows while a run goes on."""

    def __init__(self, path: Path, steps_done: int, check: Callable[[], None]) -> None:
        """Open the file, dropping what an interrupted run wrote after `steps_done` steps.

        Args:
            check: called before the file is changed; raises if it may be another process's.

        Raises:
            ValueError: a line is damaged, or its step comes after a later one.
        """
        self._check = check
        if not path.is_file():
            check()
            write_whole(path, b"", temporary=path.with_name(f".{path.name}.partial"))
        kept_bytes = _bytes_until(path, steps_done)
        if kept_bytes < path.stat().st_size:
            check()
            os.truncate(path, kept_bytes)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats are written as their shortest exact decimals."""
        self._check()
        with naming(self._path):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make the rows so far survive a power failure."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _bytes_until(path: Path, steps_done: int) -> int:
    """Where the lines of later steps begin: they follow those of earlier ones."""
    kept_bytes, last = 0, None
    for line in _whole_lines(path):
        step = _parsed(line, path)["step"]
        if last is not None and step < last:
            raise ValueError(
                f"{path} has a line of step {step} after one of step {last}: two runs wrote it; "
                "restore it, or choose another train.run_dir"
            )
        last = step
        kept_bytes += len(line) if step <= steps_done else 0
    return kept_bytes


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends; the last one is left out where it is not whole."""
    if path.is_file():
        with path.open("rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
                yield line
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(f"{path} has a line of more than {_MAX_LINE_BYTES:,} bytes")


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        # Several times as fast as json.loads.
        row: dict[str, Any] = from_json(line, allow_inf_nan=False)
        if type(row["step"]) is not int or not 0 <= row["step"] < 2**63:
            raise ValueError(f"step is {row['step']!r:.80}, no number of steps")
    except (ValueError, TypeError, KeyError) as error:
        start = line[:80].decode("utf-8", "backslashreplace").rstrip("\n")
        raise ValueError(f"{path} has a damaged line: {start!r} ({error})") from error
    return row


CONFIG_FILE = "config.yaml"
"""The settings a run was last started with."""
LOSSES_FILE = "losses.jsonl"
PERFORMANCE_FILE = "performance.jsonl"
SKIPPED_FILE = "skipped_steps.jsonl"
DAMAGED_FILE = "damaged_clips.jsonl"

TIMESTEP_BINS = 10
"""The schedule's timesteps are told in so many equal parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRow:
    """One optimiser step, averaged over the batch; independent of timing and of who computed it."""

    step: int
    """From 1: the number of steps done with it."""
    loss: float
    diffusion: float
    auxiliary: dict[str, float]
    """By objective, before weighting; empty for plain fine-tuning."""
    grad_norm: float
    """Before clipping."""
    lr: float
    by_timestep: dict[str, list[float | None]]
    """Ten values each, the first for the least noise: `count` of clips, and the means of
    `diffusion` and of every objective, null where no clip fell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceRow:
    """How long a step took and what it used: the slowest rank's wait, the fullest rank's memory."""

    step: int
    seconds: float
    wait_seconds: float
    """Of `seconds`, spent waiting for the loader."""
    clips_per_second: float
    peak_memory_bytes: int
    """Since the process started: of the GPU if there is one, otherwise of the process."""
    share_of_peak: float | None
    """Of the GPU's stated FLOP/s, without counting recomputed work; null where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedClip:
    """One clip of a step that was skipped."""

    key: str
    timestep: int
    diffusion: float | str
    """As text where JSON has no number for it: nan, inf."""
    auxiliary: dict[str, float | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRow:
    """A step that left the weights as they were."""

    step: int
    what: str
    """What was no number: `loss` or `gradient`."""
    clips: tuple[SkippedClip, ...]
    """Of every rank."""

    def suspects(self) -> list[str]:
        """Keys of the clips whose own losses are no number; of all clips where every one is."""
        bad = [clip.key for clip in self.clips if _is_text(clip)]
        return sorted(set(bad or [clip.key for clip in self.clips]))


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRow:
    """A clip that could not be read; another one took its place."""

    step: int
    key: str
    message: str
    gone: bool
    """Whether it was taken out of the cache, or made again, while the run went on: no damage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRow:
    """A line of validation.jsonl: means over the held-out clips; null where one is no number."""

    step: int
    """Steps done; 0 is the model before training."""
    clips: int
    """How many could be read."""
    diffusion: float | None
    """Over all timesteps alike."""
    auxiliary: dict[str, float | None]
    """By objective, before weighting."""
    by_timestep: dict[str, list[float | None]]
    """Lists of equal length: `timestep`, `diffusion`, and every objective."""

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.by_timestep.values()}
        if {"timestep", "diffusion", *self.auxiliary} - self.by_timestep.keys() or len(lengths) > 1:
            raise ValueError("by_timestep needs a value of every loss for each timestep")
        if None in self.by_timestep["timestep"]:
            raise ValueError("by_timestep.timestep needs numbers alone")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """Everything about one step."""

    performance: PerformanceRow
    losses: LossRow | None
    """None for a skipped step."""
    skipped: SkippedRow | None
    damaged: tuple[DamagedRow, ...]


def read_losses(run_dir: Path) -> Iterator[LossRow]:
    """Every whole line of a run's losses, one at a time; none where there is no file.

    Raises:
        ValueError: a line is damaged.
    """
    return each_of(run_dir / LOSSES_FILE, LossRow)


def as_dict(row: Any) -> dict[str, Any]:
    """A row as it is written."""
    return asdict(row)


def _is_text(clip: SkippedClip) -> bool:
    return any(isinstance(value, str) for value in (clip.diffusion, *clip.auxiliary.values()))
