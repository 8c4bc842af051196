"""Records of a run, read from its folder; the run may still be in progress.

Only `run.json` is required. Incomplete lines of `*.jsonl` are skipped.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.files.text import read_object, read_text
from stages.files.yaml import MAX_FILE_BYTES, YamlError, parse_yaml
from stages.train_student.logging.rows import (
    CONFIG_FILE,
    DAMAGED_FILE,
    LOSSES_FILE,
    PERFORMANCE_FILE,
    SKIPPED_FILE,
    DamagedRow,
    SkippedRow,
    ValidationRow,
    iter_records,
)
from stages.train_student.report.columns import (
    Columns,
    Points,
    TrainingLosses,
    read_columns,
    read_training_losses,
)

Row = dict[str, Any]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleVideo:
    """One sample video."""

    step: int
    prompt: str
    file: Path
    settings: Row
    """Denoising steps, guidance, seed, frames per second."""


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
        samples=_read_samples(run_dir / "samples"),
        checkpoints=sorted(
            int(path.name.split(".")[0].removeprefix("checkpoint-"))
            for path in (run_dir / "checkpoints").glob("checkpoint-*.complete.json")
        ),
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


def _read_samples(folder: Path) -> list[SampleVideo]:
    found = []
    for record in sorted(folder.glob(f"step-*/{SAMPLES_RECORD}")):
        settings = read_object(record, step=int, prompts=list, denoising_steps=int, seed=int)
        prompts = settings.pop("prompts")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{record} is damaged: prompts must be a list of texts")
        if type(settings.get("guidance")) not in (int, float):
            raise ValueError(f"{record} is damaged: guidance is {settings.get('guidance')!r:.80}")
        found += [
            SampleVideo(
                step=settings["step"],
                prompt=prompt,
                file=record.with_name(f"{number}.mp4"),
                settings=settings,
            )
            for number, prompt in enumerate(prompts)
        ]
    return sorted(found, key=lambda sample: sample.step)
