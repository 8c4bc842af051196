"""Going on from the newest complete checkpoint."""

from pathlib import Path
from typing import Any

import torch

from stages.progress import Progress
from stages.train_student.checkpoints.records import PREFIX, Checkpoint, complete_checkpoints
from stages.train_student.distributed import World, on_first_rank


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
    for folder in sorted(root.glob(f"{PREFIX}*")):
        if folder.is_dir() and folder.name not in whole:
            progress.log(f"passing over {folder}: it was not written to the end")
    return complete[0] if complete else None


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
