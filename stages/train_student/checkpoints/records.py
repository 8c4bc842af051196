"""Checkpoint records: finding complete checkpoints, verifying and removing them."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from cache_schema.atomic_io import sync, write_atomic
from cache_schema.checksummed_json import crc32c_hex
from stages.files.checksums import (
    FileChecksum,
    checksums_from_json,
    describe_damage,
    files_below,
)
from stages.files.text import read_object
from stages.train_student.parallel.process_group import World, gather

PREFIX = "checkpoint-"
UNIVERSAL = "universal"
"""Subfolder for universal copies, which can be loaded with any number of processes."""
_RECORD_SUFFIX = ".complete.json"

CHECKING_TIME = timedelta(hours=6)
"""How long a rank waits for others to read their files: about 100 GB over a slow network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int
    planned_steps: int
    """`train.steps` when it was saved, the end of decaying schedules."""
    files: Mapping[str, FileChecksum] = field(repr=False)
    """Path relative to the folder -> size and checksum."""

    @property
    def on_nvme(self) -> bool:
        """Whether its optimizer states are NVMe swap files."""
        return (self.folder / "offloaded_tensors").is_dir()


def checkpoints_of(run_dir: Path) -> Path:
    """Folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return root / f"{PREFIX}{step}"


def universal_folder(folder: Path) -> Path:
    """Folder of a checkpoint's universal copy, which may not exist."""
    return folder.parent / UNIVERSAL / folder.name


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """Checkpoints that have a record and files of the recorded sizes, newest first."""
    found = []
    for record in root.glob(f"{PREFIX}*{_RECORD_SUFFIX}"):
        checkpoint = read_record(root / record.name.removesuffix(_RECORD_SUFFIX))
        if checkpoint is not None:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def read_record(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`; None if the record or a file is missing, or a size differs.

    Checksums are not verified; `find_damage` does that.
    """
    found = _read(folder)
    return found if isinstance(found, Checkpoint) else None


def why_incomplete(folder: Path) -> str | None:
    """Return why the folder is not a complete checkpoint; None if it is."""
    found = _read(folder)
    return found if isinstance(found, str) else None


def _read(folder: Path) -> Checkpoint | str:
    """The checkpoint in `folder`, or why it is not complete."""
    try:
        checkpoint = _parse(folder)
    except FileNotFoundError:
        return "it is incomplete"
    except (OSError, ValueError):
        return (
            f"its record {record_path(folder).name} is damaged, or was written by another version "
            "of this software"
        )
    found = files_below(folder)
    for name in sorted(found.keys() | checkpoint.files.keys()):
        recorded = checkpoint.files.get(name)
        size = found[name].stat().st_size if name in found else None
        if recorded is None or size != recorded.bytes:
            actual = "is missing" if size is None else f"has {size} bytes"
            expected = "no such file" if recorded is None else f"{recorded.bytes} bytes"
            return f"its files differ from its record: {name} {actual}, expected {expected}"
    return checkpoint


def find_damage(checkpoint: Checkpoint, world: World) -> str | None:
    """Verify the checksums of all files; every rank must call this.

    Each rank reads a part of the files, including those it wrote, so this takes as long as reading
    one rank's files.

    Returns:
        What is wrong, with file names; None if the checkpoint is intact. The same on every rank.
    """
    names = own_files(checkpoint.files, world)
    errors = (describe_damage(checkpoint.folder / name, checkpoint.files[name]) for name in names)
    first = next((error for error in errors if error is not None), None)
    found = gather(world, first, timeout=CHECKING_TIME)
    return "; ".join(error for error in found if error is not None) or None


def own_files(names: Iterable[str], world: World) -> list[str]:
    """Names of the files that this rank reads to compute checksums; each is read by one rank.

    File names of DeepSpeed and of the EMA contain the rank that wrote them; that rank may still
    have them in its page cache.
    """
    mine = []
    for number, name in enumerate(sorted(names)):
        written_by = re.search(r"rank_(\d+)", name)
        rank = number if written_by is None else int(written_by.group(1))
        if rank % world.size == world.rank:
            mine.append(name)
    return mine


def write_record(checkpoint: Checkpoint) -> None:
    """Mark the folder complete; its files must be synced already."""
    record = record_path(checkpoint.folder)
    content = {
        "step": checkpoint.step,
        "world_size": checkpoint.world_size,
        "zero_stage": checkpoint.zero_stage,
        "planned_steps": checkpoint.planned_steps,
        "files": {name: asdict(checksum) for name, checksum in checkpoint.files.items()},
    }
    checksummed = {"crc32c": _record_crc(content), **content}
    write_atomic(record, json.dumps(checksummed, indent=1).encode())


def _parse(folder: Path) -> Checkpoint:
    """Read a record.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content = read_object(
        record_path(folder),
        crc32c=str,
        step=int,
        world_size=int,
        zero_stage=int,
        planned_steps=int,
        files=dict,
    )
    if content.pop("crc32c") != _record_crc(content):
        raise ValueError(f"{record_path(folder)} does not match its CRC-32C")
    return Checkpoint(
        folder=folder,
        step=content["step"],
        world_size=content["world_size"],
        zero_stage=content["zero_stage"],
        planned_steps=content["planned_steps"],
        files=checksums_from_json(content["files"]),
    )


def _record_crc(content: dict[str, Any]) -> str:
    """CRC-32C of the record's JSON, without the checksum itself."""
    return crc32c_hex(json.dumps(content).encode())


def record_path(folder: Path) -> Path:
    """Path of the record; its presence marks `folder` as complete."""
    return folder.with_name(folder.name + _RECORD_SUFFIX)


def incomplete_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders that are not complete."""
    folders = (folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())
    return sorted(folder for folder in folders if read_record(folder) is None)


def delete_checkpoint(folder: Path) -> None:
    """Remove a checkpoint and its universal copy.

    Records are removed first, so that none marks a partly removed folder as complete.
    """
    for copy in (folder, universal_folder(folder)):
        record_path(copy).unlink(missing_ok=True)
        if copy.is_dir():
            sync(copy.parent)
            shutil.rmtree(copy)


def keep_newest(root: Path, kept: int, step: int, *, best: int | None = None) -> None:
    """Remove incomplete checkpoints, and all complete ones except the newest `kept` and the best.

    A damaged checkpoint that has a record stays, since its files may be restored.

    Args:
        step: step of the last checkpoint. Later checkpoints were found damaged when the run was
            resumed from an earlier one: they are neither counted nor removed.
        best: step of the best checkpoint, which stays in any case.
    """
    reached = [found for found in complete_checkpoints(root) if found.step <= step]
    for old in reached[kept:]:
        if old.step != best:
            delete_checkpoint(old.folder)
    for folder in incomplete_checkpoints(root):
        if not record_path(folder).exists():
            delete_checkpoint(folder)


def sync_tree(folder: Path) -> None:
    """Sync all files and folders below `folder`, so that they survive a power failure."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))
    sync(folder.parent)
