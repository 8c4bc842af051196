"""Stage two from beginning to end: checks, engine, loop, checkpoints, export.

`pipeline` calls `train_student` in every process of a run.
"""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.base_facts import VAE_SPATIAL_COMPRESSION, BaseFacts, read_base_facts
from stages.base_model import resolve_base_model
from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.progress import Progress, SilentProgress
from stages.train_student.checkpoints.resuming import resume
from stages.train_student.checkpoints.saving import save_checkpoint
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import CachedSamples, load_batches
from stages.train_student.data.order import accumulation_steps, micro_batches
from stages.train_student.data.store_checks import check_stores
from stages.train_student.data.stores import JoinedStores, join_stores
from stages.train_student.distributed import (
    World,
    on_first_rank,
    process_group,
    world_from_environment,
)
from stages.train_student.engine import check_engine_settings, deepspeed_engine, weights_dtype
from stages.train_student.export import EXPORT_FOLDER, export_weights
from stages.train_student.loop import train_steps
from stages.train_student.loss_record import LossRecord, read_losses
from stages.train_student.objectives import build_objective
from stages.train_student.run_folder import (
    finished_steps,
    fixed_settings,
    locked,
    mark_finished,
    open_run,
)
from stages.train_student.step import TrainingStep
from stages.train_student.loading import build_student
from stages.train_student.summary import TrainSummary, peak_memory_bytes

_CONFIGURATIONS = ("transformer/config.json", "vae/config.json", "scheduler")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What the parts of one training share."""

    config: TrainConfig
    clips: ClipsConfig
    model: BaseModelConfig
    facts: BaseFacts
    stores: JoinedStores
    world: World
    progress: Progress

    @property
    def accumulation(self) -> int:
        config = self.config
        return accumulation_steps(config.batch_size, config.micro_batch_size, self.world.size)


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
        CacheError: a store is missing or damaged.
        TrainingDivergedError: a loss or gradient is infinite or no number.
    """
    world = world_from_environment()
    if not world.is_first:
        progress = SilentProgress()
    check_engine_settings(config, world.size)
    facts = read_base_facts(resolve_base_model(model, _CONFIGURATIONS))
    stores = join_stores(
        cache_root,
        config.stores,
        teacher_form=config.teacher_form if config.objectives else None,
        leave_out=config.leave_out,
    )
    check_stores(stores, facts, clips, radius=config.lgf.radius)
    _check_block(config, facts)
    run = _Run(
        config=config,
        clips=clips,
        model=model,
        facts=facts,
        stores=stores,
        world=world,
        progress=progress,
    )
    with process_group(world), ExitStack() as stack:
        on_first_rank(world, lambda: stack.enter_context(locked(config.run_dir)))
        on_first_rank(world, lambda: _open(run, resolved_config, provenance))
        done = on_first_rank(world, lambda: finished_steps(config.run_dir))
        if done is not None and done >= config.steps:
            return _summary(run, done, resumed_from=done, durations=[], finished=True)
        _tell_stores(run)
        return _train(run)


def _check_block(config: TrainConfig, facts: BaseFacts) -> None:
    blocks = facts.transformer["num_layers"]
    if config.objectives and config.block >= blocks:
        raise ValueError(
            f"train.block must be under {blocks}, the base model's number of blocks, got "
            f"{config.block}; about 0.6 of the depth, {int(0.6 * blocks)}, is usual"
        )


def _open(run: _Run, resolved_config: dict[str, Any], provenance: dict[str, Any]) -> None:
    stores = {
        kind: {"folder": reader.name, "settings_hash": reader.settings.hash}
        for kind, reader in run.stores.readers.items()
    }
    about = {
        "provenance": provenance,
        "processes": run.world.size,
        "stores": stores,
        "left_out": run.stores.left_out.as_dict(),
    }
    settings = fixed_settings(run.config, run.clips, run.model, run.facts, run.stores)
    open_run(run.config.run_dir, settings, resolved_config, about)


def _tell_stores(run: _Run) -> None:
    clips = f"training on {len(run.stores.keys)} clips"
    run.progress.log("; ".join([clips, *run.stores.left_out.told()]))


def _train(run: _Run) -> TrainSummary:
    config, world = run.config, run.world
    dtype = weights_dtype(config.deepspeed)
    only_trained = config.method == "lora"
    checkpoints = config.run_dir / "checkpoints"
    resolve_base_model(run.model, (*_CONFIGURATIONS, "transformer"))
    student = build_student(
        config,
        run.facts,
        dtype,
        num_frames=run.clips.num_frames,
        teacher_maps=run.stores.teacher_maps,
    )
    with ExitStack() as stack:
        engine = stack.enter_context(deepspeed_engine(student, config, world))
        done = resume(engine, checkpoints, world, run.progress, strict=not only_trained)
        if done:
            run.progress.log(f"going on after step {done}")
        steps = range(done, max(done, config.steps))
        record = stack.enter_context(_open_record(run, done)) if world.is_first else None
        task = stack.enter_context(
            run.progress.task("train", steps.stop, completed=done, unit="steps")
        )

        def after_step(step: int) -> None:
            if step % config.checkpoint_every == 0 or step == steps.stop:
                if record is not None:
                    record.sync()
                save_checkpoint(
                    engine,
                    checkpoints,
                    step,
                    world,
                    kept=config.checkpoints_kept,
                    only_trained=only_trained,
                )

        durations = train_steps(
            engine,
            _training_step(run, dtype),
            _batches(run, steps),
            steps,
            accumulation=run.accumulation,
            world=world,
            record=record,
            task=task,
            after_step=after_step,
        )
        export = export_weights(student, config.run_dir, world)
        on_first_rank(world, lambda: mark_finished(config.run_dir, steps.stop, export))
    return _summary(run, steps.stop, resumed_from=done or None, durations=durations, finished=False)


def _open_record(run: _Run, done: int) -> LossRecord:
    return LossRecord(
        run.config.run_dir,
        done,
        log_every=run.config.log_every,
        auxiliary="lgf",
        progress=run.progress,
    )


def _training_step(run: _Run, dtype: torch.dtype) -> TrainingStep:
    clips, config = run.clips, run.config
    return TrainingStep(
        run.facts,
        (
            clips.num_latent_frames,
            clips.height // VAE_SPATIAL_COMPRESSION,
            clips.width // VAE_SPATIAL_COMPRESSION,
        ),
        build_objective(config),
        config.lgf.weight,
        native_parts=run.stores.native_parts,
        device=run.world.device,
        dtype=dtype,
    )


def _batches(run: _Run, steps: range) -> Any:
    config, world = run.config, run.world
    numbers = micro_batches(
        steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    return load_batches(
        CachedSamples(run.stores, run.facts, config.seed),
        numbers,
        workers=config.loader_workers,
        start=config.loader_start,
        pin_memory=world.device.type == "cuda",
    )


def _summary(
    run: _Run, steps: int, *, resumed_from: int | None, durations: list[float], finished: bool
) -> TrainSummary:
    rows = read_losses(run.config.run_dir)
    if not rows:
        raise ValueError(
            f"{run.config.run_dir} has lost its losses.jsonl, though the run made {steps} steps; "
            "restore it, or choose another train.run_dir"
        )
    return TrainSummary(
        run_dir=run.config.run_dir,
        steps_done=steps,
        resumed_from=resumed_from,
        first=rows[0],
        last=rows[-1],
        seconds_per_step=statistics.median(durations) if durations else None,
        peak_memory_bytes=peak_memory_bytes(),
        export=run.config.run_dir / EXPORT_FOLDER,
        clips=len(run.stores.keys),
        left_out=run.stores.left_out.not_in_every_store,
        left_out_by_name=run.stores.left_out.named,
        already_finished=finished,
    )
