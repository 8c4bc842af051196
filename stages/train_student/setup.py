"""Checks before anything large is loaded, and the constant parts of a run.

Everything here is created before the DeepSpeed engine, or does not depend on it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.progress import Progress
from stages.sample_videos.runs import TRANSFORMER_CLASS
from stages.students.experts import trained_configs
from stages.students.sampler import first_frame
from stages.students.student import StudentConfigs
from stages.students.weights import Part, check_base_weights, hash_transformer
from stages.train_student.config import TrainConfig
from stages.train_student.data.checks import check_stores
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import (
    accumulation_steps,
    largest_micro_batch,
    micro_batches,
)
from stages.train_student.data.splits import digest
from stages.train_student.data.stores import Buckets, JoinedStores, join_buckets
from stages.train_student.logging.trackers import check_trackers
from stages.train_student.model.lora import check_targets
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import (
    build_heads,
    build_objectives,
    check_teacher,
    kinds_needed,
)
from stages.train_student.parallel.deepspeed import check_engine_settings, weights_dtype
from stages.train_student.parallel.ema import check_average
from stages.train_student.parallel.process_group import World, gather
from stages.train_student.run_folder import RunLock, fixed_settings, held_out_before, open_run
from stages.train_student.step import TrainingStep
from stages.train_student.timesteps import check_timesteps
from stages.train_student.validation.best import check_keep_best


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run: its settings, the model facts and stores they refer to, and this rank."""

    config: TrainConfig
    clips: ClipsConfig
    model: BaseModelConfig
    configs: StudentConfigs
    stores: Buckets
    world: World
    progress: Progress
    lock: RunLock
    """Held by rank 0, which checks it before any change to the run's folder."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights in the forward and backward pass."""
        return weights_dtype(self.config.deepspeed)

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        config = self.config
        return accumulation_steps(config.batch_size, config.micro_batch_size, self.world.size)

    @property
    def timesteps(self) -> int:
        """Number of timesteps of the base model's schedule."""
        return self.configs.timesteps

    @property
    def num_clips(self) -> int:
        """Number of training clips, over all sizes."""
        return sum(self.stores.clips.values())

    @property
    def sizes(self) -> list[tuple[ClipsConfig, JoinedStores]]:
        """Clip sizes, and the stores of each."""
        return list(zip(self.clips.sizes, self.stores.stores, strict=True))

    @property
    def samples(self) -> CachedSamples:
        """The training samples."""
        config = self.config
        return CachedSamples(
            self.stores.stores, self.configs, seed=config.seed, batch_size=config.batch_size
        )

    def heads(self) -> nn.ModuleDict:
        """Build a new projector for each objective."""
        teacher, visual = self.stores.teacher, self.stores.visual
        return build_heads(
            self.config,
            self.configs,
            None if teacher is None else teacher.settings,
            frame_rate=self.stores.frame_rate,
            visual=None if visual is None else visual.settings,
        )

    def training_step(self) -> TrainingStep:
        """Build the forward pass with its losses."""
        teacher, visual = self.stores.teacher, self.stores.visual
        return TrainingStep(
            self.configs,
            build_objectives(self.config),
            layout=TeacherLayout.of(None if teacher is None else teacher.settings),
            visual_layout=None if visual is None else TeacherLayout.of(visual.settings),
            device=self.world.device,
            dtype=self.dtype,
        )

    def batches(self, steps: range) -> BatchLoader:
        """Load this rank's micro-batches of those steps."""
        config, world = self.config, self.world
        numbers = micro_batches(
            steps,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        return BatchLoader(
            self.samples,
            numbers,
            workers=config.loader_workers,
            start=config.loader_start,
            pin_memory=world.device.type == "cuda",
        )

    def check_ranks_agree(self) -> None:
        """Check that all ranks opened the same stores and clips; every rank must call this.

        Raises:
            ValueError: the ranks found different clips.
        """
        mine = ([digest(joined.keys) for joined in self.stores.stores], self.stores.held_out)
        clips = gather(self.world, (mine, self.num_clips))
        if any(of_rank != clips[0] for of_rank in clips):
            counts = ", ".join(str(count) for _, count in clips)
            raise ValueError(
                f"the processes found different clips to train on ({counts}): the cache changed "
                "while they opened it; run the same command again"
            )

    def open(
        self, base: Path, resolved_config: dict[str, Any], provenance: dict[str, Any]
    ) -> str | None:
        """Create the run's folder, or check that it holds this run.

        Args:
            base: folder of the base model, with the weights of the trained transformer.

        Returns:
            A warning if the run resumes with fewer clips than it started with.

        Raises:
            ValueError: the folder holds another run.
            LockLost: another process may be training in it.
        """
        stores = {
            kind: {"folder": reader.name, "settings_hash": reader.settings.hash}
            for kind, reader in self.stores.readers.items()
        }
        metadata = {
            "provenance": provenance,
            "model": self.model.model_dump(mode="json"),
            TRANSFORMER_CLASS: self.configs.model_class("transformer").__name__,
            "processes": self.world.size,
            "stores": stores,
            "clips": self.stores.clips,
            "left_out": asdict(self.stores.excluded),
        }
        settings = fixed_settings(
            self.config,
            self.clips,
            self.configs,
            self.stores,
            base_weights=hash_transformer(base, self.configs.transformer_part),
        )
        self.lock.check()
        return open_run(
            self.config.run_dir,
            settings,
            resolved_config,
            metadata,
            clips={joined.size: joined.keys for joined in self.stores.stores},
            held_out=self.stores.held_out,
            leave_out=self.config.leave_out,
        )


def prepare(
    config: TrainConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path | str,
    world: World,
    progress: Progress,
) -> Run:
    """Read configurations and stores, and check everything before any weights are loaded.

    Raises:
        ValueError: settings contradict each other, the stores, or the model.
        CacheError: a store is missing or damaged.
    """
    micro_batch = largest_micro_batch(config.batch_size, config.micro_batch_size, world.size)
    config = config.model_copy(update={"micro_batch_size": micro_batch})
    check_engine_settings(config)
    check_average(config)
    check_trackers(config.report_to)
    check_keep_best(config)
    kinds_needed(config)  # refuses settings, before the base model is looked up
    configs = trained_configs(model)
    check_block(config, configs)
    check_timesteps(config, configs)
    if config.method == "lora":
        check_targets(config.lora, configs)
    stores = open_checked_stores(
        config,
        clips,
        configs,
        cache_root,
        held_out=config.validation.clips,
        held_out_before=held_out_before(config.run_dir, config.validation.clips),
    )
    check_samples(config, configs, model, clips.sizes[0])
    if model.is_local:  # others are checked once they are downloaded
        check_base_weights(configs.folder, weights_needed(config, configs))
    return Run(
        config=config,
        clips=clips,
        model=model,
        configs=configs,
        stores=stores,
        world=world,
        progress=progress,
        lock=RunLock(config.run_dir),
    )


def open_checked_stores(
    config: TrainConfig,
    clips: ClipsConfig,
    configs: StudentConfigs,
    cache_root: Path | str,
    *,
    held_out: int = 0,
    held_out_before: Sequence[str] | None = None,
) -> Buckets:
    """Open the stores of every size, and check that they fit the objectives and the base model.

    Args:
        held_out: number of validation clips; `held_out_before` as for `join_buckets`.

    Raises:
        ValueError: settings contradict the stores, or the stores the model.
        CacheError: a store is missing or damaged.
    """
    stores = join_buckets(
        cache_root,
        clips.sizes,
        config.stores,
        kinds=kinds_needed(config),
        leave_out=config.leave_out,
        held_out=held_out,
        held_out_before=held_out_before,
        student=configs,
    )
    for size, joined in zip(clips.sizes, stores.stores, strict=True):
        check_stores(joined, configs, size, radius=config.lgf.radius)
    for joined in stores.stores:
        if joined.teacher is not None:
            check_teacher(config, joined.teacher.settings, str(joined.teacher.path))
    return stores


def weights_needed(config: TrainConfig, configs: StudentConfigs) -> tuple[Part, ...]:
    """Parts of the base model whose weights a run loads."""
    if config.samples.prompts:
        return (configs.transformer_part, "tokenizer", "text_encoder", "vae")
    return (configs.transformer_part,)


def check_block(config: TrainConfig, configs: StudentConfigs) -> None:
    """Check that the transformer has the block (`ValueError`)."""
    blocks = configs.num_blocks
    if config.objectives and config.block >= blocks:
        raise ValueError(
            f"train.block must be under {blocks}, the base model's number of blocks, got "
            f"{config.block}; blocks count from 0, and the presets use one at about 0.6 of the "
            f"depth, {int(0.6 * blocks)}"
        )


def check_samples(
    config: TrainConfig, configs: StudentConfigs, model: BaseModelConfig, clips: ClipsConfig
) -> None:
    """Check the settings of samples.

    Args:
        clips: the size of the sample videos.

    Raises:
        ValueError: an invalid setting; names the field and a valid value.
    """
    samples = config.samples
    if samples.prompts and configs.expert is not None:
        raise ValueError(
            f"train.samples.prompts needs both transformers of {model.path}, of which a run loads "
            "one; set it to [], and use sam2vx-pipeline sample once the run is finished"
        )
    if not all(prompt.strip() for prompt in samples.prompts):
        raise ValueError("train.samples.prompts holds an empty prompt; remove it, or fill it in")
    if not configs.image_to_video and samples.images:
        raise ValueError(f"{model.path} is a text-to-video model; leave out train.samples.images")
    if configs.image_to_video and len(samples.images) != len(samples.prompts):
        raise ValueError(
            f"{model.path} is an image-to-video model: train.samples.images must name one image "
            f"for each of the {len(samples.prompts)} prompts, got {len(samples.images)}"
        )
    if samples.prompts:
        configs.check_sampling(scheduler="model", dynamic_cfg=False)
    for image in samples.images:
        first_frame(image, clips)
