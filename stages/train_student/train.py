"""Stage two from beginning to end: checks, engine, loop, checkpoints, export.

`pipeline` calls `train_student` in every process of a run.
"""

import statistics
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from stages.base_model import resolve_base_model
from stages.base_weights import check_base_weights
from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.progress import Progress, SilentProgress
from stages.stop_request import stop_on_signals
from stages.train_student.checkpoints.records import keep_newest
from stages.train_student.checkpoints.resuming import plan_resume, resume
from stages.train_student.checkpoints.saving import save_checkpoint
from stages.train_student.config import TrainConfig
from stages.train_student.damaged_clips import DamagedClips
from stages.train_student.distributed import (
    on_first_rank,
    process_group,
    world_from_environment,
)
from stages.train_student.ema import WeightAverage
from stages.train_student.engine import batch_told, deepspeed_engine
from stages.train_student.export import EXPORT_FOLDER, export_weights
from stages.train_student.loading import build_student
from stages.train_student.logs.row_file import each_of, each_row
from stages.train_student.logs.rows import DAMAGED_FILE, SKIPPED_FILE, DamagedRow, read_losses
from stages.train_student.loop import Loop
from stages.train_student.optimizers import describe_new_length
from stages.train_student.performance import device_rate, peak_memory_bytes
from stages.train_student.run import CONFIGURATIONS, Run, prepare
from stages.train_student.run_folder import finished_steps, mark_finished
from stages.train_student.skipped_steps import SkippedInARow
from stages.train_student.student import Student
from stages.train_student.summary import TrainSummary
from stages.train_student.validation.build import build_validation, embed_prompts

_DOWNLOAD_TIME = timedelta(hours=6)
"""How long the ranks wait until each has the transformer's weights."""


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
    """Train, or go on training, the student of `config.run_dir` from the cache alone.

    Every process of a run calls this alike; `torchrun` or `deepspeed` tell each its place.

    Args:
        config: what is trained, how long, and where the run is kept.
        clips: size and length of the clips the cache was made from.
        model: the base pipeline.
        cache_root: folder of the stores, or its URL.
        resolved_config: the whole configuration, kept with the run.
        provenance: versions and the like, kept with the run.
        progress: used on rank 0 alone.

    Raises:
        ValueError: settings contradict each other, the stores, the model or an earlier run;
            raised before any weight is loaded.
        CacheError: a store is missing, or too much of it damaged.
        LockUnsupported: the run's folder is on a file system without locks.
        LockLost: another process may be training in the run's folder by now.
        TrainingDivergedError: too many losses or gradients in a row are no number.
        KeyboardInterrupt: asked to stop by Ctrl-C or SIGTERM; a checkpoint has what was done.
    """
    world = world_from_environment()
    if not world.is_first:
        progress = SilentProgress()
    run = prepare(config, clips, model, cache_root, world, progress)
    with process_group(world), ExitStack() as stack:
        on_first_rank(world, lambda: stack.enter_context(run.lock))
        run.refuse_ranks_with_other_clips()
        base = resolve_base_model(run.model, (*CONFIGURATIONS, "transformer"))
        check_base_weights(base, ("transformer",))
        # Other machines may still be downloading.
        fewer_clips = on_first_rank(
            world, lambda: run.open(base, resolved_config, provenance), patience=_DOWNLOAD_TIME
        )
        done = on_first_rank(world, lambda: finished_steps(config.run_dir))
        if done is not None and done >= config.steps:
            return _summary(run, done, resumed_from=done, durations=[], finished=True)
        progress.log("; ".join(run.stores.told()))
        if fewer_clips is not None:
            progress.log(f"warning: {fewer_clips}")
        progress.log(batch_told(run.config, world.size))
        return _train(run)


def _train(run: Run) -> TrainSummary:
    config, world = run.config, run.world
    only_trained = config.method == "lora"
    nvme = "nvme" in (config.deepspeed.offload_optimizer, config.deepspeed.offload_parameters)
    if nvme:
        run.progress.log(
            "what waits on nvme comes back from no checkpoint: this run cannot go on once stopped"
        )
    check = run.lock.check
    plan = plan_resume(run.checkpoints, world, run.progress, nvme=nvme, check=check)
    universal = plan is not None and plan.universal
    embeds = embed_prompts(run)
    student = build_student(config, run.facts, run.dtype, heads=run.heads, world=world)
    with ExitStack() as stack:
        engine = stack.enter_context(deepspeed_engine(student, config, world, universal=universal))
        average = _average(run, student)
        load = [] if average is None else [average.load]
        done = resume(engine, plan, world, strict=not only_trained, beside=load)
        if done:
            run.progress.log(f"resuming after step {done}")
        if plan is not None and plan.checkpoint.planned_steps != config.steps:
            run.progress.log(describe_new_length(config, done, plan.checkpoint.planned_steps))
        steps = range(done, max(done, config.steps))
        skipped = SkippedInARow(config.run_dir, done, most=config.max_skipped_steps, world=world)
        boards = run.boards(done) if world.is_first else None
        log = None if boards is None else stack.enter_context(run.log(boards, done))
        task = stack.enter_context(
            run.progress.task("train", steps.stop, completed=done, unit="steps")
        )
        validation = build_validation(run, student, embeds, boards=boards, note=task.note)

        def save(step: int) -> None:
            if log is not None:
                log.sync()
            save_checkpoint(
                engine,
                run.checkpoints,
                step,
                world,
                check=check,
                planned_steps=config.steps,
                kept=config.checkpoints_kept,
                only_trained=only_trained,
                beside=[] if average is None else [average.save],
            )

        def after_step(step: int, stopping: bool) -> None:
            last = step == steps.stop
            if last or stopping or step % config.checkpoint_every == 0:
                save(step)
            if last or not stopping:
                validation.after_step(step)

        validation.start(done)
        with (
            stop_on_signals() as stop,
            stop.deferred("stopping after this step, which is kept"),
            run.batches(steps) as batches,
        ):
            durations = Loop(
                run=run,
                engine=engine,
                training_step=run.training_step(),
                batches=batches,
                skipped=skipped,
                damaged=DamagedClips(clips=run.num_clips, most=config.max_damaged, world=world),
                rate=device_rate(config, run.facts, run.sizes, run.progress) if log else None,
                stop=stop,
                log=log,
                after_update=(lambda: None) if average is None else average.update,
                after_step=after_step,
            ).make(steps, task)
            stop.fulfil()  # it came at the last step: what is left is done in any case
        export = export_weights(
            student, config.run_dir, world, step=steps.stop, average=average, check=check
        )

        def finish() -> None:
            check()
            # What a process left that died once the last checkpoint was complete.
            keep_newest(run.checkpoints, config.checkpoints_kept, steps.stop)
            check()
            mark_finished(config.run_dir, steps.stop, export)

        on_first_rank(world, finish)
        validation.write_page()
    return _summary(run, steps.stop, resumed_from=done or None, durations=durations, finished=False)


def _average(run: Run, student: Student) -> WeightAverage | None:
    decay = run.config.ema.decay
    return None if decay is None else WeightAverage(student, decay, run.world)


def _summary(
    run: Run, steps: int, *, resumed_from: int | None, durations: list[float], finished: bool
) -> TrainSummary:
    run_dir = run.config.run_dir
    first = last = None
    for last in read_losses(run_dir):
        first = first or last
    unreadable: dict[bool, set[str]] = {False: set(), True: set()}
    for row in each_of(run_dir / DAMAGED_FILE, DamagedRow):
        unreadable[row.gone].add(row.key)
    num_skipped = sum(1 for _ in each_row(run_dir / SKIPPED_FILE))
    if last is None and num_skipped < steps:
        raise ValueError(
            f"{run_dir} has lost its losses.jsonl, though the run made {steps} steps; restore it, "
            "or choose another train.run_dir"
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
        left_out=run.stores.left_out.not_in_every_store,
        left_out_by_name=run.stores.left_out.named,
        already_finished=finished,
    )
