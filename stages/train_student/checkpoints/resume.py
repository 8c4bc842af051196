"""Going on from the newest complete checkpoint, on the same number of processes or on another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from stages.progress import Progress
from stages.train_student.checkpoints.records import (
    Checkpoint,
    clear,
    complete_checkpoints,
    find_damage,
    read_record,
    record_of,
    torn_checkpoints,
    why_incomplete,
)
from stages.train_student.checkpoints.universal import (
    is_eight_bit,
    quantize_moments,
    universal_copy,
    universal_folder,
)
from stages.train_student.checkpoints.unpickling import deepspeed_loads_weights_only
from stages.train_student.parallel.process_group import World, gather, on_first_rank

_CONVERSION_TIME = timedelta(hours=6)
"""How long the ranks wait for the universal copy; two copies of all optimizer states are written,
which for five billion weights is some 130 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePlan:
    """What a run goes on from; the engine must be made as `universal` says."""

    checkpoint: Checkpoint
    folder: Path
    """What DeepSpeed loads: the checkpoint's folder, or its universal copy."""

    @property
    def universal(self) -> bool:
        """Whether the engine loads a universal checkpoint."""
        return self.folder != self.checkpoint.folder


def plan_resume(
    root: Path,
    world: World,
    progress: Progress,
    *,
    nvme: bool,
    check: Callable[[], None],
) -> ResumePlan | None:
    """Find the newest sound checkpoint, and make its universal copy if that is needed.

    Called by every rank, before the engine is made. All files are compared with their checksums
    first; the ranks agree on what is damaged, so that all of them load the same checkpoint.

    Args:
        root: folder of the checkpoints.
        nvme: whether the run offloads anything to nvme, which no checkpoint brings back.
        check: called on rank 0 before anything is removed or written; raises if the run's folder
            may be another process's.

    Raises:
        ValueError: the checkpoint cannot be loaded as this run is set up, or none is sound; says
            what would do.
    """
    newest = _newest_sound(root, world, progress, check)
    if newest is None:
        return None
    _check_nvme(newest, nvme)
    if newest.world_size == world.size or newest.zero_stage == 0:
        return ResumePlan(checkpoint=newest, folder=newest.folder)
    progress.log(
        f"{newest.folder} was written by {newest.world_size} processes, now there are "
        f"{world.size}: sharing it out anew"
    )
    on_first_rank(world, check)
    _drop_damaged_copy(newest, world, progress)
    copy = on_first_rank(world, lambda: universal_copy(newest), patience=_CONVERSION_TIME)
    return ResumePlan(checkpoint=newest, folder=copy)


def resume(
    engine: Any,
    plan: ResumePlan | None,
    world: World,
    *,
    strict: bool,
    beside: Sequence[Callable[[Path, int], None]] = (),
) -> int:
    """Load what `plan_resume` found into the engine, and return the number of steps done.

    Args:
        strict: whether the checkpoint holds every weight (not only the trained ones).
        beside: each reads what its twin in `save_checkpoint` wrote; given the checkpoint's folder
            and the number of processes that wrote it.

    Raises:
        ValueError: there are too many processes for so few weights.
    """
    if plan is None:
        return 0
    if plan.universal:
        _check_shares(engine, world)
    with deepspeed_loads_weights_only():
        loaded, client_state = engine.load_checkpoint(
            str(plan.folder.parent), tag=plan.folder.name, load_module_strict=strict
        )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {plan.folder}")
    if plan.universal and is_eight_bit(engine.optimizer.optimizer):
        quantize_moments(engine)
    _set_rates(engine.lr_scheduler)
    for read in beside:
        read(plan.checkpoint.folder, plan.checkpoint.world_size)
    _set_random_state(client_state["rng"], world)
    return int(client_state["step"])


def _set_rates(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """The next step's learning rate by the schedule as it is now: the checkpoint holds the rate of
    the run's length at that time, which after the last step of a falling one is zero.
    """
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _newest_sound(
    root: Path, world: World, progress: Progress, check: Callable[[], None]
) -> Checkpoint | None:
    """The newest checkpoint whose files are those that were written; None in a new run."""

    def look() -> tuple[list[Checkpoint], dict[Path, str]]:
        check()
        damaged = {}
        for folder in torn_checkpoints(root):
            why = why_incomplete(folder) or ""
            progress.log(f"passing over {folder}: {why}")
            if record_of(folder).exists():
                damaged[folder] = why
            else:
                clear(folder)  # a full disk may have no room for another beside it
        return complete_checkpoints(root), damaged

    complete, damaged = on_first_rank(world, look)
    for checkpoint in complete:
        damage = find_damage(checkpoint, world)
        if damage is None:
            if damaged:
                progress.log(f"using {checkpoint.folder} instead")
            return checkpoint
        damaged[checkpoint.folder] = f"it is damaged: {damage}"
        progress.log(f"passing over {checkpoint.folder}: {damaged[checkpoint.folder]}")
    if damaged:
        told = "; ".join(f"{folder.name}: {why}" for folder, why in damaged.items())
        raise ValueError(
            f"no checkpoint in {root} is sound ({told}); restore the files from a copy, or delete "
            f"{root} to train from the first step"
        )
    return None


def _drop_damaged_copy(checkpoint: Checkpoint, world: World, progress: Progress) -> None:
    """Take the record from a universal copy whose files are not those that were written."""
    folder = universal_folder(checkpoint)
    copy = on_first_rank(world, lambda: read_record(folder))
    damage = None if copy is None else find_damage(copy, world)
    if damage is not None:
        progress.log(f"making {folder} again, which is damaged: {damage}")
        on_first_rank(world, record_of(folder).unlink)


def _check_nvme(checkpoint: Checkpoint, nvme: bool) -> None:
    """DeepSpeed 0.19 saves what waits on a disk, and loads not all of it: losses would differ."""
    if checkpoint.on_nvme or nvme:
        raise ValueError(
            f"{checkpoint.folder} cannot be gone on from: DeepSpeed does not bring back all that "
            "waits on nvme, and losses would be others. Choose another train.run_dir, with "
            "train.deepspeed.offload_optimizer and offload_parameters set to cpu for a run that "
            "can be stopped"
        )


def _check_shares(engine: Any, world: World) -> None:
    """With ZeRO 1 and 2 DeepSpeed loads universal checkpoints only where every rank has weights."""
    if engine.zero_optimization_stage() > 2:
        return
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    holds_some = any(getattr(p, "_hp_mapping", None) is not None for p in trained)
    if not all(gather(world, holds_some)):
        raise ValueError(
            f"{sum(p.numel() for p in trained)} trained weights are too few for {world.size} "
            "processes, some of which would have none, to go on from a checkpoint of another "
            "number of them; start fewer processes, or as many as wrote the checkpoint"
        )


def _set_random_state(states: list[dict[str, torch.Tensor]], world: World) -> None:
    """Each rank's own; ranks that were not there before go on from another's, moved on."""
    state = states[world.rank % len(states)]
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if world.rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + world.rank)
