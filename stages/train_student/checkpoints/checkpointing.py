"""Saving checkpoints, and resuming from the newest intact one with any number of processes.

Every rank writes its files, then rank 0 writes the record.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stages.files.checksums import checksum_of, files_below
from stages.files.tensor_files import write_error_reason
from stages.progress import Progress
from stages.train_student.checkpoints.best import best_step
from stages.train_student.checkpoints.records import (
    CHECKING_TIME,
    Checkpoint,
    checkpoint_folder,
    checkpoints_of,
    complete_checkpoints,
    delete_checkpoint,
    find_damage,
    incomplete_checkpoints,
    keep_newest,
    own_files,
    read_record,
    record_path,
    sync_tree,
    universal_folder,
    why_incomplete,
    write_record,
)
from stages.train_student.checkpoints.universal import (
    is_eight_bit,
    quantize_moments,
    universal_copy,
)
from stages.train_student.config import TrainConfig
from stages.train_student.parallel.deepspeed import deepspeed_loads_weights_only
from stages.train_student.parallel.ema import WeightAverage
from stages.train_student.parallel.process_group import World, barrier, gather, on_first_rank

_CONVERSION_TIME = timedelta(hours=6)
"""How long the ranks wait for the universal copy. All optimizer states are written twice: about
130 GB for five billion weights."""


def save_checkpoint(
    engine: Any,
    config: TrainConfig,
    step: int,
    world: World,
    *,
    average: WeightAverage | None,
    check: Callable[[], None],
) -> None:
    """Save the state after `step` steps, and remove all but the newest checkpoints and the best.

    Frozen weights, which are those of the base model, are not saved.

    Args:
        engine: the DeepSpeed engine.
        average: the run's EMA, if it keeps one.
        check: called on rank 0 before each change; raises if another process may own the run's
            folder.

    Raises:
        OSError: a file could not be written; gives the path, the size of a checkpoint, and the one
            to resume from.
    """
    root = checkpoints_of(config.run_dir)
    folder = checkpoint_folder(root, step)
    with _explain_write_errors(root, folder, step, config):

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
            exclude_frozen_parameters=config.method == "lora",
        )
        if average is not None:
            average.save(folder)
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
                planned_steps=config.steps,
                files={n: checksum for rank in checksums_of_ranks for n, checksum in rank.items()},
            )
            check()
            write_record(checkpoint)
            check()
            best = best_step(config.run_dir)
            keep_newest(root, config.checkpoints_kept, step, best=best)

        on_first_rank(world, finish)


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
    config: TrainConfig, world: World, progress: Progress, *, check: Callable[[], None]
) -> ResumePlan | None:
    """Find the newest intact checkpoint, and convert it to a universal one if needed.

    Every rank must call this, before the engine is built. The checksums of all files are verified;
    the ranks agree on what is damaged, so that all of them load the same checkpoint.

    Args:
        check: called on rank 0 before each change; raises if another process may own the run's
            folder.

    Raises:
        ValueError: the checkpoint cannot be loaded with these settings, or none is intact; says
            what to do.
    """
    newest = _newest_intact(checkpoints_of(config.run_dir), world, progress, check)
    if newest is None:
        return None
    if newest.on_nvme or config.deepspeed.uses_nvme:
        # DeepSpeed 0.19 saves the state of NVMe offload, but does not load all of it.
        raise ValueError(
            f"{newest.folder} cannot be resumed: DeepSpeed does not restore all "
            "NVMe-offloaded state, so the losses would differ. Choose another train.run_dir; for "
            "a run that can be resumed, set train.deepspeed.offload_optimizer and "
            "offload_parameters to cpu"
        )
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
    config: TrainConfig,
    world: World,
    *,
    average: WeightAverage | None,
) -> int:
    """Load the planned checkpoint into the engine and the EMA; returns the number of steps done.

    Raises:
        ValueError: there are more processes than the trained weights can be partitioned over.
    """
    if plan is None:
        return 0
    if plan.universal:
        _check_partitions(engine, world)
    with deepspeed_loads_weights_only():
        loaded, client_state = engine.load_checkpoint(
            str(plan.folder.parent),
            tag=plan.folder.name,
            load_module_strict=config.method != "lora",  # others hold only the trained weights
        )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {plan.folder}")
    if plan.universal and is_eight_bit(engine.optimizer.optimizer):
        quantize_moments(engine)
    _set_learning_rates(engine.lr_scheduler)
    if average is not None:
        average.load(plan.checkpoint.folder, plan.checkpoint.world_size)
    _set_random_state(client_state["rng"], world)
    return int(client_state["step"])


@contextmanager
def _explain_write_errors(
    root: Path, folder: Path, step: int, config: TrainConfig
) -> Iterator[None]:
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
        # The one being written, and the best.
        more = "one checkpoint" if config.keep_best is None else "two checkpoints"
        raise OSError(
            f"the checkpoint {folder} could not be written: {why}; {state}. The disk needs room "
            f"for {more} more than train.checkpoints_kept"
        ) from error


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


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
    folder = universal_folder(checkpoint.folder)
    copy = on_first_rank(world, lambda: read_record(folder))
    damage = None if copy is None else find_damage(copy, world)
    if damage is not None:
        progress.log(f"converting {folder} again, which is damaged: {damage}")
        on_first_rank(world, record_path(folder).unlink)


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
