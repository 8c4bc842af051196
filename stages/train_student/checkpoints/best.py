"""The record of a run's best checkpoint, <run_dir>/best.json.

It is written once the checkpoint is complete and its curve computed (validation/best.py), so that
it never names a checkpoint that is still being written.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cache_schema.atomic_io import write_atomic
from stages.files.text import read_text

_BEST_FILE = "best.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BestCheckpoint:
    """The content of best.json."""

    step: int
    curve: str
    """`train.keep_best` when it was chosen, such as validation/diffusion."""
    value: float
    before_training: float | None
    """The base model's value; None if it is unknown, NaN or infinite."""


def read_best(run_dir: Path) -> BestCheckpoint | None:
    """The best checkpoint of a run; None if none is recorded.

    Raises:
        ValueError: best.json is damaged.
    """
    file = run_dir / _BEST_FILE
    if not file.is_file():
        return None
    try:
        return TypeAdapter(BestCheckpoint).validate_json(read_text(file, 4096), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "".join(f"{part}: " for part in first["loc"])
        raise ValueError(
            f"{file} is damaged ({name}{first['msg']}); the next start of the run writes it again"
        ) from error


def best_step(run_dir: Path) -> int | None:
    """Step of the best checkpoint, which is kept besides the newest; None if none is recorded."""
    best = read_best(run_dir)
    return None if best is None else best.step


def write_best(run_dir: Path, best: BestCheckpoint | None) -> None:
    """Replace best.json, or delete it if there is no best checkpoint."""
    file = run_dir / _BEST_FILE
    if best is None:
        file.unlink(missing_ok=True)
    else:
        write_atomic(file, json.dumps(asdict(best), indent=1).encode())
