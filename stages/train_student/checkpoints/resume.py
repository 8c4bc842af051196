"""Resuming from the newest intact checkpoint, with the same or another number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from stages.progress import Progress
from stages.train_student.checkpoints.records import (
    Checkpoint,
    complete_checkpoints,
    delete_checkpoint,
    find_damage,
    incomplete_checkpoints,
    read_record,
    record_path,
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
"""How long the ranks wait for the universal copy. All optimizer states are written twice: about
130 GB for five billion weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePlan:
    """Checkpoint to resume from; the engine must be built for a universal one if `universal`."""

    checkpoint: Checkpoint
    folder: Path
    """Folder that DeepSpeed loads: the checkpoint, or its universal copy."""

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
    """Find the newest intact checkpoint, and convert it to a universal one if needed.

    Every rank must call this, before the engine is built. The checksums of all files are verified;
    the ranks agree on what is damaged, so that all of them load the same checkpoint.

    Args:
        root: folder of the checkpoints.
        nvme: whether the run offloads to NVMe, which a checkpoint cannot restore.
        check: called on rank 0 before each change; raises if another process may own the run's
            folder.

    Raises:
        ValueError: the checkpoint cannot be loaded with these settings, or none is intact; says
            what to do.
    """
    newest = _newest_intact(root, world, progress, check)
    if newest is None:
        return None
    _check_nvme(newest, nvme)
    if newest.world_size == world.size or newest.zero_stage == 0:
        return ResumePlan(checkpoint=newest, folder=newest.folder)
    progress.log(
        f"{newest.folder} was written by {newest.world_size} processes, now there are "
        f"{world.size}: converting it to a universal checkpoint"
    )
    on_first_rank(world, check)
    _drop_damaged_copy(newest, world, progress)
    copy = on_first_rank(world, lambda: universal_copy(newest), timeout=_CONVERSION_TIME)
    return ResumePlan(checkpoint=newest, folder=copy)


def resume(
    engine: Any,
    plan: ResumePlan | None,
    world: World,
    *,
    strict: bool,
    extra_loaders: Sequence[Callable[[Path, int], None]] = (),
) -> int:
    """Load the planned checkpoint into the engine, and return the number of steps done.

    Args:
        strict: whether the checkpoint holds all weights, not only the trained ones.
        extra_loaders: called with the checkpoint's folder and the number of processes that wrote
            it, to read what the `extra_savers` of `save_checkpoint` wrote.

    Raises:
        ValueError: there are more processes than the trained weights can be partitioned over.
    """
    if plan is None:
        return 0
    if plan.universal:
        _check_partitions(engine, world)
    with deepspeed_loads_weights_only():
        loaded, client_state = engine.load_checkpoint(
            str(plan.folder.parent), tag=plan.folder.name, load_module_strict=strict
        )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {plan.folder}")
    if plan.universal and is_eight_bit(engine.optimizer.optimizer):
        quantize_moments(engine)
    _set_learning_rates(engine.lr_scheduler)
    for load in extra_loaders:
        load(plan.checkpoint.folder, plan.checkpoint.world_size)
    _set_random_state(client_state["rng"], world)
    return int(client_state["step"])


def _set_learning_rates(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Recompute the next step's learning rate from the current schedule.

    The checkpoint's rate follows the `train.steps` of that time; at the end of a decaying schedule
    it is zero.
    """
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _newest_intact(
    root: Path, world: World, progress: Progress, check: Callable[[], None]
) -> Checkpoint | None:
    """The newest checkpoint whose checksums match; None in a new run."""

    def scan() -> tuple[list[Checkpoint], dict[Path, str]]:
        check()
        damaged = {}
        for folder in incomplete_checkpoints(root):
            why = why_incomplete(folder) or ""
            progress.log(f"skipping {folder}: {why}")
            if record_path(folder).exists():
                damaged[folder] = why
            else:
                delete_checkpoint(folder)  # frees room for the next one, in case the disk is full
        return complete_checkpoints(root), damaged

    complete, damaged = on_first_rank(world, scan)
    for checkpoint in complete:
        damage = find_damage(checkpoint, world)
        if damage is None:
            if damaged:
                progress.log(f"using {checkpoint.folder} instead")
            return checkpoint
        damaged[checkpoint.folder] = f"it is damaged: {damage}"
        progress.log(f"skipping {checkpoint.folder}: {damaged[checkpoint.folder]}")
    if damaged:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in damaged.items())
        raise ValueError(
            f"no checkpoint in {root} is intact ({reasons}); restore the files from a copy, or "
            f"delete {root} to train from the first step"
        )
    return None


def _drop_damaged_copy(checkpoint: Checkpoint, world: World, progress: Progress) -> None:
    """Remove the record of a universal copy whose checksums do not match."""
    folder = universal_folder(checkpoint)
    copy = on_first_rank(world, lambda: read_record(folder))
    damage = None if copy is None else find_damage(copy, world)
    if damage is not None:
        progress.log(f"converting {folder} again, which is damaged: {damage}")
        on_first_rank(world, record_path(folder).unlink)


def _check_nvme(checkpoint: Checkpoint, nvme: bool) -> None:
    """Refuse NVMe offload: DeepSpeed 0.19 saves its state, but does not load all of it."""
    if checkpoint.on_nvme or nvme:
        raise ValueError(
            f"{checkpoint.folder} cannot be resumed: DeepSpeed does not restore all "
            "NVMe-offloaded state, so the losses would differ. Choose another train.run_dir; for "
            "a run that can be resumed, set train.deepspeed.offload_optimizer and "
            "offload_parameters to cpu"
        )


def _check_partitions(engine: Any, world: World) -> None:
    """Check that every rank has weights, as ZeRO 1 and 2 need to load universal checkpoints."""
    if engine.zero_optimization_stage() > 2:
        return
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    holds_some = any(getattr(p, "_hp_mapping", None) is not None for p in trained)
    if not all(gather(world, holds_some)):
        raise ValueError(
            f"{sum(p.numel() for p in trained)} trained weights are too few for {world.size} "
            "processes to resume from a checkpoint of another number of processes: some would "
            "have no weights. Start fewer processes, or as many as wrote the checkpoint"
        )


def _set_random_state(states: list[dict[str, torch.Tensor]], world: World) -> None:
    """Restore this rank's RNG state; additional ranks are seeded from another rank's state."""
    state = states[world.rank % len(states)]
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if world.rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + world.rank)
