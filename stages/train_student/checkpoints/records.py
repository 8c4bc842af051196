"""Which checkpoints are complete: their records, and removing them; saving and resuming use it."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cache_schema.durable import sync, write_whole

PREFIX = "checkpoint-"
UNIVERSAL = "universal"
"""Folder beside the checkpoints that holds their copies for another number of processes."""
_RECORD_SUFFIX = ".complete.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int
    planned_steps: int
    """Length of the run when it was written, at which falling schedules ended."""

    @property
    def on_nvme(self) -> bool:
        """Whether its optimizer states are the swap files of each rank."""
        return (self.folder / "offloaded_tensors").is_dir()


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"{PREFIX}{step}"


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """Checkpoints with a record and with files of the recorded sizes, newest first."""
    found = []
    for record in root.glob(f"{PREFIX}*{_RECORD_SUFFIX}"):
        checkpoint = read_record(root / record.name.removesuffix(_RECORD_SUFFIX))
        if checkpoint is not None:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_complete(root: Path) -> Checkpoint | None:
    """The complete checkpoint of the most steps, if there is any."""
    return next(iter(complete_checkpoints(root)), None)


def read_record(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`; None if its record or a file is missing or of another size."""
    try:
        content = json.loads(record_of(folder).read_text(encoding="utf-8"))
        if not folder.is_dir() or content["files"] != _sizes(folder):
            return None
        return Checkpoint(
            folder=folder,
            step=int(content["step"]),
            world_size=int(content["world_size"]),
            zero_stage=int(content["zero_stage"]),
            planned_steps=int(content["planned_steps"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(checkpoint: Checkpoint) -> None:
    """Say that the folder, whose files are synced, is complete."""
    record = record_of(checkpoint.folder)
    content = {
        "step": checkpoint.step,
        "world_size": checkpoint.world_size,
        "zero_stage": checkpoint.zero_stage,
        "planned_steps": checkpoint.planned_steps,
        "files": _sizes(checkpoint.folder),
    }
    temporary = record.with_name(f".{record.name}.partial")
    write_whole(record, json.dumps(content, indent=1).encode(), temporary=temporary)


def record_of(folder: Path) -> Path:
    """The file whose presence says that `folder` is complete."""
    return folder.with_name(folder.name + _RECORD_SUFFIX)


def torn_checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints that are not complete."""
    folders = (folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())
    return sorted(folder for folder in folders if read_record(folder) is None)


def clear(folder: Path) -> None:
    """Remove a checkpoint, its record first, so that no record stands for a half-removed folder.

    Its universal copy goes with it.
    """
    for part in (folder, folder.parent / UNIVERSAL / folder.name):
        record_of(part).unlink(missing_ok=True)
        if part.is_dir():
            sync(part.parent)
            shutil.rmtree(part)


def keep_newest(root: Path, kept: int) -> None:
    """Remove all complete checkpoints but the newest, and what an interrupted run left unfinished.

    A damaged checkpoint that has a record stays: somebody may restore its files.
    """
    for old in complete_checkpoints(root)[kept:]:
        clear(old.folder)
    for torn in torn_checkpoints(root):
        if not record_of(torn).exists():
            clear(torn)


def sync_tree(folder: Path) -> None:
    """Make everything below `folder` survive a power failure."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))
    sync(folder.parent)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
