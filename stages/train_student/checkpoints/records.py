"""Which checkpoints are complete: their records, and removing them; saving and resuming use it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cache_schema.durable import sync

PREFIX = "checkpoint-"
_RECORD_SUFFIX = ".complete.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    world_size: int


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """Checkpoints with a record and with files of the recorded sizes, newest first."""
    found = []
    for record in root.glob(f"{PREFIX}*{_RECORD_SUFFIX}"):
        folder = root / record.name.removesuffix(_RECORD_SUFFIX)
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            whole = folder.is_dir() and content["files"] == sizes(folder)
            checkpoint = Checkpoint(
                folder=folder, step=int(content["step"]), world_size=int(content["world_size"])
            )
        except (ValueError, KeyError, TypeError):
            continue
        if whole:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def record_of(folder: Path) -> Path:
    """The file whose presence says that `folder` is complete."""
    return folder.with_name(folder.name + _RECORD_SUFFIX)


def clear(folder: Path) -> None:
    """Remove a checkpoint, its record first, so that no record stands for a half-removed folder."""
    record_of(folder).unlink(missing_ok=True)
    if folder.is_dir():
        sync(folder.parent)
        shutil.rmtree(folder)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by path."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
