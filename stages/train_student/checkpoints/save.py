"""Saving a checkpoint: every rank writes its files, then rank 0 writes the record."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stages.files.checksums import checksum_of, files_below
from stages.files.tensor_files import write_error_reason
from stages.train_student.checkpoints.records import (
    CHECKING_TIME,
    Checkpoint,
    checkpoint_folder,
    complete_checkpoints,
    delete_checkpoint,
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
    extra_savers: Sequence[Callable[[Path], None]] = (),
) -> None:
    """Save the state after `step` steps, and remove all but the newest `kept` checkpoints.

    Args:
        engine: the DeepSpeed engine.
        root: folder of the checkpoints.
        check: called on rank 0 before each change; raises if another process may own the run's
            folder.
        planned_steps: `train.steps`.
        only_trained: exclude frozen weights, which are those of the base model.
        extra_savers: called with the checkpoint's folder to write more files of this rank, such as
            the EMA, before the checkpoint is marked complete; file names must differ between ranks.

    Raises:
        OSError: a file could not be written; gives the path, the size of a checkpoint, and the one
            to resume from.
    """
    folder = checkpoint_folder(root, step)
    with _explain_write_errors(root, folder, step):

        def begin() -> None:
            check()
            delete_checkpoint(folder)

        on_first_rank(world, begin)
        client_state = {"step": step, "rng": gather(world, _random_state())}
        engine.save_checkpoint(
            str(root),
            tag=folder.name,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=only_trained,
        )
        for save in extra_savers:
            save(folder)
        barrier(world)
        written = on_first_rank(world, lambda: list(files_below(folder)))
        # Each rank reads the files that it has just written, likely still in the page cache.
        checksums = {name: checksum_of(folder / name) for name in own_files(written, world)}
        if world.local_rank == 0:
            sync_tree(folder)
        checksums_of_ranks = gather(world, checksums, timeout=CHECKING_TIME)

        def finish() -> None:
            checkpoint = Checkpoint(
                folder=folder,
                step=step,
                world_size=world.size,
                zero_stage=engine.zero_optimization_stage(),
                planned_steps=planned_steps,
                files={n: checksum for rank in checksums_of_ranks for n, checksum in rank.items()},
            )
            check()
            write_record(checkpoint)
            check()
            keep_newest(root, kept, step)

        on_first_rank(world, finish)


@contextmanager
def _explain_write_errors(root: Path, folder: Path, step: int) -> Iterator[None]:
    """Explain a failed write: where, the size of a checkpoint, and which one can be resumed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = write_error_reason(error, folder)
        if why is None:
            raise
        newest = next((found for found in complete_checkpoints(root) if found.step <= step), None)
        if newest is None:
            state = "no earlier checkpoint is complete"
        else:
            size = sum(file.bytes for file in newest.files.values())
            state = (
                f"{newest.folder.name} has {size / 1e9:.2f} GB and is complete: the same command "
                f"resumes after step {newest.step}"
            )
        raise OSError(
            f"the checkpoint {folder} could not be written: {why}; {state}. The disk needs room "
            "for one checkpoint more than train.checkpoints_kept"
        ) from error


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
