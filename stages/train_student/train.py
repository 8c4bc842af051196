"""Training of the student: checks, DeepSpeed engine, training loop, checkpoints, export."""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.processes.stop_request import StopRequest, stop_on_signals
from stages.progress import Progress, SilentProgress
from stages.students.experts import CONFIGURATIONS
from stages.students.hub import resolve_base_model
from stages.students.weights import check_base_weights
from stages.train_student.checkpoints.best import best_step
from stages.train_student.checkpoints.checkpointing import plan_resume, resume, save_checkpoint
from stages.train_student.checkpoints.export import EXPORT_FOLDER, export_weights
from stages.train_student.checkpoints.records import checkpoints_of, keep_newest
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch, DamagedClip
from stages.train_student.guards import (
    ConsecutiveSkipGuard,
    DamagedClipGuard,
    nan_if_nonfinite,
    update,
)
from stages.train_student.logging.performance import (
    DeviceRate,
    StepClock,
    device_rate,
    peak_memory_bytes,
)
from stages.train_student.logging.rows import (
    DAMAGED_FILE,
    SKIPPED_FILE,
    DamagedRow,
    LossRow,
    SkippedRow,
    StepRows,
    iter_records,
    iter_rows,
    read_losses,
)
from stages.train_student.logging.run_log import RunLog
from stages.train_student.model.loading import build_student
from stages.train_student.parallel.deepspeed import (
    deepspeed_engine,
    describe_batch,
    describe_rounding,
)
from stages.train_student.parallel.ema import WeightAverage
from stages.train_student.parallel.optimizers import describe_new_length
from stages.train_student.parallel.process_group import (
    on_first_rank,
    process_group,
    world_from_environment,
)
from stages.train_student.run_folder import finished_steps, mark_finished
from stages.train_student.setup import Run, prepare
from stages.train_student.step import StepTotals, TrainingStep
from stages.train_student.validation.samples import embed_prompts
from stages.train_student.validation.validation import build_validation

_DOWNLOAD_TIME = timedelta(hours=6)
"""How long the ranks wait for each other to download the transformer's weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """Outcome of a training run."""

    run_dir: Path
    steps_done: int
    resumed_from: int | None
    """Steps that were done before this start; None for a new run."""
    first: LossRow | None
    """First logged step; None if every step was skipped."""
    last: LossRow | None
    skipped_steps: int
    """Skipped steps of the whole run."""
    damaged_clips: int
    """Clips that were damaged at some step of the whole run."""
    gone_clips: int
    """Clips that were removed from the cache, or extracted again, during the run."""
    seconds_per_step: float | None
    """Mean over the steps since this start; None if there were none."""
    peak_memory_bytes: int
    """Of the GPU if there is one, otherwise of this process."""
    export: Path
    clips: int
    excluded: dict[str, int]
    """Number of clips of each kind of store that are missing from another kind."""
    excluded_by_name: int
    """Number of clips excluded by `train.leave_out`."""
    already_finished: bool


def train_student(
    config: TrainConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path | str,
    *,
    resolved_config: dict[str, Any],
    provenance: dict[str, Any],
    progress: Progress,
) -> TrainSummary:
    """Train the student, or resume the run in `config.run_dir`; reads all data from the cache.

    Every rank must call this. Rank and world size come from the launcher's environment variables
    (`torchrun`, `deepspeed`).

    Args:
        config: training settings.
        clips: size and length of the clips in the cache.
        model: the base pipeline.
        cache_root: folder of the stores, or its URL.
        resolved_config: the whole configuration, saved with the run.
        provenance: software versions and the like, saved with the run.
        progress: used on rank 0 only.

    Raises:
        ValueError: settings contradict each other, the stores, the model or an earlier run;
            raised before any weights are loaded.
        CacheError: a store is missing, or too many of its clips are damaged.
        LockUnsupported: the run's folder is on a file system without locks.
        LockLost: another process may be training in the run's folder.
        TrainingDivergedError: the loss or gradient is NaN or infinite for too many steps in a row.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    world = world_from_environment()
    if not world.is_first:
        progress = SilentProgress()
    run = prepare(config, clips, model, cache_root, world, progress)
    with process_group(world), ExitStack() as stack:
        on_first_rank(world, lambda: stack.enter_context(run.lock))
        run.check_ranks_agree()
        part = run.configs.transformer_part
        base = resolve_base_model(run.model, (*CONFIGURATIONS, part))
        check_base_weights(base, (part,))
        # Other machines may still be downloading.
        fewer_clips = on_first_rank(
            world, lambda: run.open(base, resolved_config, provenance), timeout=_DOWNLOAD_TIME
        )
        done = on_first_rank(world, lambda: finished_steps(config.run_dir))
        if done is not None and done >= config.steps:
            return _summary(run, done, resumed_from=done, durations=[], finished=True)
        progress.log("; ".join(run.stores.describe()))
        for warning in (*(joined.warning for joined in run.stores.stores), fewer_clips):
            if warning is not None:
                progress.log(f"warning: {warning}")
        progress.log(describe_batch(run.config, world.size))
        return _train(run)


def _train(run: Run) -> TrainSummary:
    config, world, check = run.config, run.world, run.lock.check
    if config.deepspeed.uses_nvme:
        run.progress.log(
            "NVMe offload cannot be resumed from a checkpoint: this run must not be stopped"
        )

    # Student, engine, and the state of an earlier run.
    plan = plan_resume(config, world, run.progress, check=check)
    embeds = embed_prompts(run)
    student = build_student(config, run.configs, run.dtype, heads=run.heads, world=world)
    if (rounding := describe_rounding(student, config)) is not None:
        run.progress.log(rounding)
    with ExitStack() as stack:
        universal = plan is not None and plan.universal
        engine = stack.enter_context(deepspeed_engine(student, config, world, universal=universal))
        decay = config.ema.decay
        average = None if decay is None else WeightAverage(student, decay, world)
        done = resume(engine, plan, config, world, average=average)
        if done:
            run.progress.log(f"resuming after step {done}")
        if plan is not None and plan.checkpoint.planned_steps != config.steps:
            run.progress.log(describe_new_length(config, done, plan.checkpoint.planned_steps))
        steps = range(done, max(done, config.steps))

        # Logs, validation, and guards against divergence and damaged clips.
        log = None
        if world.is_first:
            log = stack.enter_context(RunLog(config, done, check=check, progress=run.progress))
        task = stack.enter_context(
            run.progress.task("train", steps.stop, completed=done, unit="steps")
        )
        validation = build_validation(
            run, student, embeds, trackers=None if log is None else log.trackers, note=task.note
        )
        skipped = ConsecutiveSkipGuard(config, done, world)
        damaged = DamagedClipGuard(
            clips=run.num_clips, max_fraction=config.max_damaged, world=world
        )
        durations: list[float] = []

        validation.start(done)
        with (
            stop_on_signals() as stop,
            stop.deferred("stopping after this step, with a checkpoint"),
            run.batches(steps) as batches,
        ):
            training_step = run.training_step()
            device = device_rate(config, run.configs, run.sizes, run.progress) if log else None
            for step in steps:
                # Forward and backward passes, and the update.
                rows, stopping = _train_step(
                    run, engine, training_step, batches, step, average, damaged, device, stop
                )

                # Log; too many skipped steps or damaged clips stop the run.
                durations.append(rows.performance.seconds)
                if log is not None:
                    log.add(rows)
                skipped.add(rows.skipped)
                damaged.add(rows.damaged)
                task.advance()
                if rows.losses is not None:
                    task.note(f"loss {rows.losses.loss:.4f}")

                # Save, validate, stop.
                is_last = step + 1 == steps.stop
                if is_last or stopping or (step + 1) % config.checkpoint_every == 0:
                    if log is not None:
                        log.sync()
                    save_checkpoint(engine, config, step + 1, world, average=average, check=check)
                if is_last or not stopping:
                    validation.after_step(step + 1)
                if stopping and not is_last:
                    run.progress.log(f"stopped after step {step + 1}; its checkpoint is saved")
                    stop.mark_handled()
                    raise KeyboardInterrupt
            stop.mark_handled()  # a signal during the last step: the run finishes anyway

        export = export_weights(
            student,
            config.run_dir,
            world,
            step=steps.stop,
            average=average,
            check=check,
            expert=run.configs.expert,
        )
        on_first_rank(world, lambda: _finish(run, steps.stop, export))
        validation.write_page()
    return _summary(run, steps.stop, resumed_from=done or None, durations=durations, finished=False)


def _train_step(
    run: Run,
    engine: Any,
    training_step: TrainingStep,
    batches: Iterator[Batch],
    step: int,
    average: WeightAverage | None,
    damaged: DamagedClipGuard,
    device: DeviceRate | None,
    stop: StopRequest,
) -> tuple[StepRows, bool]:
    """Run one optimiser step, over all micro-batches and ranks.

    Returns:
        The step's log rows, and whether any rank was asked to stop.
    """
    world = run.world
    learning_rate = float(engine.get_lr()[0])
    clock = StepClock()
    totals = StepTotals(run.config.objectives, run.timesteps, world.device)
    damaged_here: list[DamagedClip] = []
    for micro_step in range(run.accumulation):
        batch = clock.next(batches).to(world.device)
        if step == 0 and micro_step == 0 and world.is_first:
            for text in training_step.describe_teacher(batch):
                run.progress.log(text)
        losses = training_step(engine, batch, step)
        engine.backward(nan_if_nonfinite(losses))
        totals.add(batch.keys, batch.timestep_B, losses, len(batch.damaged))
        damaged_here += batch.damaged
        if device is not None:
            clock.add_flops(device.model_flops(batch))
        if micro_step < run.accumulation - 1:
            engine.step()  # only counts the micro-step; `update` changes the weights after the last

    grad_norm = update(engine)
    if grad_norm is not None and average is not None:
        average.update()

    means = totals.over_ranks(world)
    losses_row = skipped_row = None
    if grad_norm is None:
        what = "gradient" if means.finite else "loss"
        skipped_row = SkippedRow(step=step + 1, what=what, clips=totals.clips(world))
    else:
        losses_row = means.row(step + 1, grad_norm, learning_rate)
    damaged_rows = damaged.gather_rows(step + 1, damaged_here) if means.damaged else ()
    performance, stopping = clock.row(
        step + 1,
        clips=run.config.batch_size,
        world=world,
        peak_flops=None if device is None else device.peak_flops,
        stop=stop.requested,
    )
    rows = StepRows(
        performance=performance, losses=losses_row, skipped=skipped_row, damaged=damaged_rows
    )
    return rows, stopping


def _finish(run: Run, steps: int, export: Path) -> None:
    config, check = run.config, run.lock.check
    check()
    # Remove old checkpoints left by a crash after the last save, and a best one since surpassed.
    keep_newest(
        checkpoints_of(config.run_dir),
        config.checkpoints_kept,
        steps,
        best=best_step(config.run_dir),
    )
    check()
    mark_finished(config.run_dir, steps, export)


def _summary(
    run: Run, steps: int, *, resumed_from: int | None, durations: list[float], finished: bool
) -> TrainSummary:
    run_dir = run.config.run_dir
    first = last = None
    for last in read_losses(run_dir):
        first = first or last
    unreadable: dict[bool, set[str]] = {False: set(), True: set()}
    for row in iter_records(run_dir / DAMAGED_FILE, DamagedRow):
        unreadable[row.gone].add(row.key)
    num_skipped = sum(1 for _ in iter_rows(run_dir / SKIPPED_FILE))
    if last is None and num_skipped < steps:
        raise ValueError(
            f"losses.jsonl is missing or empty in {run_dir}, though the run made {steps} steps; "
            "restore it, or choose another train.run_dir"
        )
    return TrainSummary(
        run_dir=run_dir,
        steps_done=steps,
        resumed_from=resumed_from,
        first=first,
        last=last,
        skipped_steps=num_skipped,
        damaged_clips=len(unreadable[False]),
        gone_clips=len(unreadable[True]),
        seconds_per_step=statistics.fmean(durations) if durations else None,
        peak_memory_bytes=peak_memory_bytes(),
        export=run_dir / EXPORT_FOLDER,
        clips=run.num_clips,
        excluded=run.stores.excluded.not_in_every_store,
        excluded_by_name=run.stores.excluded.named,
        already_finished=finished,
    )
