"""Writing a checkpoint on every rank, and its record when all of it lies there."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from cache_schema.durable import sync, write_whole
from stages.train_student.checkpoints.records import (
    PREFIX,
    clear,
    complete_checkpoints,
    record_of,
    sizes,
)
from stages.train_student.distributed import World, barrier, gather, on_first_rank


def save_checkpoint(
    engine: Any, root: Path, step: int, world: World, *, kept: int, only_trained: bool
) -> None:
    """Write the state after `step` steps, record it as complete, drop all but the newest `kept`.

    Args:
        engine: the DeepSpeed engine.
        root: folder of the checkpoints.
        only_trained: leave out frozen weights, which the base model has.
    """
    folder = root / f"{PREFIX}{step}"
    record = record_of(folder)
    on_first_rank(world, lambda: clear(folder))
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
        content = {"step": step, "world_size": world.size, "files": sizes(folder)}
        temporary = record.with_name(f".{record.name}.partial")
        write_whole(record, json.dumps(content, indent=1).encode(), temporary=temporary)
        for old in complete_checkpoints(root)[kept:]:
            clear(old.folder)

    on_first_rank(world, finish)


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
