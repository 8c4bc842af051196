"""Which checkpoints are complete and sound: their records, checking and removing them.

Saving, resuming and exporting use it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from cache_schema.atomic_io import sync, write_whole
from stages.files.checksums import (
    FileChecksum,
    checksum_of_bytes,
    checksums_from_json,
    damage_of,
    files_below,
)
from stages.files.text import read_object
from stages.train_student.parallel.process_group import World, gather

PREFIX = "checkpoint-"
UNIVERSAL = "universal"
"""Folder beside the checkpoints that holds their copies for another number of processes."""
_RECORD_SUFFIX = ".complete.json"

CHECKING_TIME = timedelta(hours=6)
"""How long a rank waits for the others to read their files: some 100 GB over a slow network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int
    planned_steps: int
    """Length of the run when it was written, at which falling schedules ended."""
    files: Mapping[str, FileChecksum] = field(repr=False)
    """By their paths from the folder."""

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


def read_record(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`; None if its record or a file is missing or of another size.

    What the files hold is not looked at: `find_damage` does that.
    """
    return None if why_incomplete(folder) is not None else _parse(folder)


def why_incomplete(folder: Path) -> str | None:
    """Why a folder counts as no checkpoint, or None if it is complete."""
    try:
        checkpoint = _parse(folder)
    except FileNotFoundError:
        return "it was not written to the end"
    except (OSError, ValueError):
        return (
            f"its record {record_of(folder).name} is damaged, or was written by another version of "
            "this software"
        )
    found = files_below(folder)
    for name in sorted(found.keys() | checkpoint.files.keys()):
        recorded = checkpoint.files.get(name)
        size = found[name].stat().st_size if name in found else None
        if recorded is None or size != recorded.bytes:
            told = "is missing" if size is None else f"has {size} bytes"
            expected = "none" if recorded is None else f"{recorded.bytes} bytes"
            return (
                "its files are not those that its record names: "
                f"{name} {told}, the record says {expected}"
            )
    return None


def find_damage(checkpoint: Checkpoint, world: World) -> str | None:
    """Compare every file's bytes with the record; every rank must call this, and gets the answer.

    Each rank reads its share of the files, its own ones among them, so that the time is that of
    reading what one rank wrote.

    Returns:
        What is wrong, with the files' names; None for a sound checkpoint.
    """
    names = own_files(checkpoint.files, world)
    faults = (damage_of(checkpoint.folder / name, checkpoint.files[name]) for name in names)
    first = next((fault for fault in faults if fault is not None), None)
    found = gather(world, first, patience=CHECKING_TIME)
    return "; ".join(fault for fault in found if fault is not None) or None


def own_files(names: Iterable[str], world: World) -> list[str]:
    """The files that this rank reads to compute checksums; each is one rank's.

    DeepSpeed's and the average's names say which rank wrote a file, which may have it in memory.
    """
    mine = []
    for number, name in enumerate(sorted(names)):
        written_by = re.search(r"rank_(\d+)", name)
        rank = number if written_by is None else int(written_by.group(1))
        if rank % world.size == world.rank:
            mine.append(name)
    return mine


def write_record(checkpoint: Checkpoint) -> None:
    """Say that the folder, whose files are synced, is complete."""
    record = record_of(checkpoint.folder)
    content = {
        "step": checkpoint.step,
        "world_size": checkpoint.world_size,
        "zero_stage": checkpoint.zero_stage,
        "planned_steps": checkpoint.planned_steps,
        "files": {name: asdict(one) for name, one in checkpoint.files.items()},
    }
    sealed = {"crc32c": _seal(content), **content}
    temporary = record.with_name(f".{record.name}.partial")
    write_whole(record, json.dumps(sealed, indent=1).encode(), temporary=temporary)


def _parse(folder: Path) -> Checkpoint:
    """What a record says; raises what a missing or damaged one gives."""
    content = read_object(
        record_of(folder),
        crc32c=str,
        step=int,
        world_size=int,
        zero_stage=int,
        planned_steps=int,
        files=dict,
    )
    if content.pop("crc32c") != _seal(content):
        raise ValueError(f"{record_of(folder)} has another CRC-32C than it says")
    return Checkpoint(
        folder=folder,
        step=content["step"],
        world_size=content["world_size"],
        zero_stage=content["zero_stage"],
        planned_steps=content["planned_steps"],
        files=checksums_from_json(content["files"]),
    )


def _seal(content: dict[str, Any]) -> str:
    """The record's own checksum: of its JSON without that."""
    return checksum_of_bytes(json.dumps(content).encode())


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


def keep_newest(root: Path, kept: int, step: int) -> None:
    """Remove all complete checkpoints but the newest, and what an interrupted run left unfinished.

    A damaged checkpoint that has a record stays: somebody may restore its files.

    Args:
        step: of the last checkpoint. Later ones were found damaged when the run was resumed from an
            earlier one: they neither count nor go.
    """
    reached = [found for found in complete_checkpoints(root) if found.step <= step]
    for old in reached[kept:]:
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
