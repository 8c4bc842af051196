"""Checkpoints that are whole or not there: writing, finding, loading and dropping them.

    <run_dir>/checkpoints/
        checkpoint-500/                  DeepSpeed's files, one set per rank
        checkpoint-500.complete.json     step, processes, every file's size; written last

DeepSpeed's own `latest` file is not used: it is written before the last rank has finished. Here
every node syncs its files, all ranks meet, and then rank 0 writes the record (temporary file, sync,
rename). A folder without a fitting record is never loaded. The training loop uses this.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache_schema.durable import sync, write_whole
from stages.progress import Progress
from stages.train_student.distributed import World, barrier, gather, on_first_rank

_PREFIX = "checkpoint-"
_RECORD_SUFFIX = ".complete.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    world_size: int


def save_checkpoint(
    engine: Any, root: Path, step: int, world: World, *, kept: int, only_trained: bool
) -> None:
    """Write the state after `step` steps, record it as complete, drop all but the newest `kept`.

    Args:
        engine: the DeepSpeed engine.
        root: folder of the checkpoints.
        only_trained: leave out frozen weights, which the base model has.
    """
    folder = root / f"{_PREFIX}{step}"
    record = _record_of(folder)
    on_first_rank(world, lambda: _clear(folder))
    client_state = {"step": step, "rng": gather(world, _random_state())}
    engine.save_checkpoint(
        str(root),
        tag=folder.name,
        client_state=client_state,
        save_latest=False,
        exclude_frozen_parameters=only_trained,
    )
    barrier(world)
    if world.local_rank == 0:
        _sync_tree(folder)
        sync(root)
    barrier(world)

    def finish() -> None:
        content = {"step": step, "world_size": world.size, "files": _sizes(folder)}
        temporary = record.with_name(f".{record.name}.partial")
        write_whole(record, json.dumps(content, indent=1).encode(), temporary=temporary)
        for old in complete_checkpoints(root)[kept:]:
            _clear(old.folder)

    on_first_rank(world, finish)


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """Checkpoints with a record and with files of the recorded sizes, newest first."""
    found = []
    for record in root.glob(f"{_PREFIX}*{_RECORD_SUFFIX}"):
        folder = root / record.name.removesuffix(_RECORD_SUFFIX)
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            whole = folder.is_dir() and content["files"] == _sizes(folder)
            checkpoint = Checkpoint(
                folder=folder, step=int(content["step"]), world_size=int(content["world_size"])
            )
        except (ValueError, KeyError, TypeError):
            continue
        if whole:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def resume(engine: Any, root: Path, world: World, progress: Progress, *, strict: bool) -> int:
    """Load the newest complete checkpoint, if any, and return the number of steps done.

    Args:
        strict: whether the checkpoint holds every weight (not only the trained ones).

    Raises:
        ValueError: it was written by another number of processes.
    """
    newest = on_first_rank(world, lambda: _newest(root, progress))
    if newest is None:
        return 0
    if newest.world_size != world.size:
        raise ValueError(
            f"{newest.folder} was written by {newest.world_size} processes, now there are "
            f"{world.size}; resume with {newest.world_size}, or choose another train.run_dir"
        )
    loaded, client_state = engine.load_checkpoint(
        str(root), tag=newest.folder.name, load_module_strict=strict
    )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {newest.folder}")
    _set_random_state(client_state["rng"][world.rank])
    return int(client_state["step"])


def _newest(root: Path, progress: Progress) -> Checkpoint | None:
    complete = complete_checkpoints(root)
    whole = {checkpoint.folder.name for checkpoint in complete}
    for folder in sorted(root.glob(f"{_PREFIX}*")):
        if folder.is_dir() and folder.name not in whole:
            progress.log(f"passing over {folder}: it was not written to the end")
    return complete[0] if complete else None


def _record_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _RECORD_SUFFIX)


def _clear(folder: Path) -> None:
    """Remove a checkpoint, its record first, so that no record stands for a half-removed folder."""
    _record_of(folder).unlink(missing_ok=True)
    if folder.is_dir():
        sync(folder.parent)
        shutil.rmtree(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
