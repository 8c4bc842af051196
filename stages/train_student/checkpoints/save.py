"""Writing a checkpoint on every rank, and its record when all of it lies there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stages.files.checksums import checksum_of, files_below
from stages.files.write_errors import why_not_written
from stages.train_student.checkpoints.records import (
    CHECKING_TIME,
    Checkpoint,
    clear,
    complete_checkpoints,
    folder_of,
    keep_newest,
    own_files,
    sync_tree,
    write_record,
)
from stages.train_student.parallel.process_group import World, barrier, gather, on_first_rank


def save_checkpoint(
    engine: Any,
    root: Path,
    step: int,
    world: World,
    *,
    check: Callable[[], None],
    planned_steps: int,
    kept: int,
    only_trained: bool,
    beside: Sequence[Callable[[Path], None]] = (),
) -> None:
    """Write the state after `step` steps, record it as complete, drop all but the newest `kept`.

    Args:
        engine: the DeepSpeed engine.
        root: folder of the checkpoints.
        check: called on rank 0 before anything is removed or recorded; raises if the run's folder
            may be another process's.
        planned_steps: length of the run.
        only_trained: leave out frozen weights, which the base model has.
        beside: each writes further files of this rank into the folder it is given, before the
            checkpoint is recorded; names must differ between ranks.

    Raises:
        OSError: a file could not be written; says where, how much a checkpoint takes, and which
            one is left.
    """
    folder = folder_of(root, step)
    with _telling_what_is_left(root, folder, step):

        def begin() -> None:
            check()
            clear(folder)

        on_first_rank(world, begin)
        client_state = {"step": step, "rng": gather(world, _random_state())}
        engine.save_checkpoint(
            str(root),
            tag=folder.name,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=only_trained,
        )
        for write in beside:
            write(folder)
        barrier(world)
        written = on_first_rank(world, lambda: list(files_below(folder)))
        # Each rank reads what it has just written, which its machine still has in memory.
        mine = {name: checksum_of(folder / name) for name in own_files(written, world)}
        if world.local_rank == 0:
            sync_tree(folder)
        parts = gather(world, mine, patience=CHECKING_TIME)

        def finish() -> None:
            checkpoint = Checkpoint(
                folder=folder,
                step=step,
                world_size=world.size,
                zero_stage=engine.zero_optimization_stage(),
                planned_steps=planned_steps,
                files={name: one for part in parts for name, one in part.items()},
            )
            check()
            write_record(checkpoint)
            check()
            keep_newest(root, kept, step)

        on_first_rank(world, finish)


@contextmanager
def _telling_what_is_left(root: Path, folder: Path, step: int) -> Iterator[None]:
    """Say of a failed write where it was, what a checkpoint needs, and what can be resumed from."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = why_not_written(error, folder)
        if why is None:
            raise
        whole = next((one for one in complete_checkpoints(root) if one.step <= step), None)
        if whole is None:
            left = "no earlier checkpoint is complete"
        else:
            size = sum(file.bytes for file in whole.files.values())
            left = (
                f"{whole.folder.name} took {size / 1e9:.2f} GB and is complete: the same command "
                f"resumes after step {whole.step}"
            )
        raise OSError(
            f"the checkpoint {folder} could not be written: {why}; {left}. The disk must hold one "
            "checkpoint more than train.checkpoints_kept"
        ) from error


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
