"""Checks before anything large is loaded, and the fixed parts of a run.

Everything here is made before, or independently of, the DeepSpeed engine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.clips.config import ClipsConfig
from stages.cogvideox.configs import BaseFacts, read_base_facts, resolve_base_model
from stages.cogvideox.sampler import first_frame
from stages.cogvideox.weights import Part, check_base_weights, hash_transformer
from stages.config import BaseModelConfig
from stages.progress import Progress
from stages.train_student.config import TrainConfig
from stages.train_student.data.buckets import Buckets, join_buckets
from stages.train_student.data.checks import check_stores
from stages.train_student.data.clip_lists import digest
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import (
    accumulation_steps,
    largest_micro_batch,
    micro_batches,
)
from stages.train_student.data.stores import JoinedStores, array_shape
from stages.train_student.logging.run_log import RunLog
from stages.train_student.logging.trackers import Boards, check_boards
from stages.train_student.model.lora import check_targets
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives
from stages.train_student.objectives.needs import check_teacher, kinds_needed
from stages.train_student.parallel.deepspeed import check_engine_settings, weights_dtype
from stages.train_student.parallel.ema import check_average
from stages.train_student.parallel.process_group import World, gather
from stages.train_student.run_folder import RunLock, fixed_settings, held_out_before, open_run
from stages.train_student.step import TrainingStep

CONFIGURATIONS = ("transformer/config.json", "vae/config.json", "scheduler")
"""What of the base model is read before anything big is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training: its settings, what they refer to, and this process's place in it."""

    config: TrainConfig
    clips: ClipsConfig
    model: BaseModelConfig
    facts: BaseFacts
    stores: Buckets
    layout: TeacherLayout
    world: World
    progress: Progress
    lock: RunLock
    """Held by rank 0, which asks it before it changes anything in the run's folder."""

    @property
    def dtype(self) -> torch.dtype:
        """Format of the weights in the forward and backward pass."""
        return weights_dtype(self.config.deepspeed)

    @property
    def accumulation(self) -> int:
        """Forward passes per rank and step."""
        config = self.config
        return accumulation_steps(config.batch_size, config.micro_batch_size, self.world.size)

    @property
    def timesteps(self) -> int:
        """How many the base model's schedule has."""
        return int(self.facts.scheduler["num_train_timesteps"])

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.config.run_dir / "checkpoints"

    @property
    def num_clips(self) -> int:
        """Clips to train on, of every size together."""
        return sum(self.stores.clips.values())

    @property
    def sizes(self) -> list[tuple[ClipsConfig, JoinedStores]]:
        """The sizes of the clips, and the stores of each."""
        return list(zip(self.clips.sizes, self.stores.stores, strict=True))

    @property
    def samples(self) -> CachedSamples:
        """The clips as they are trained on."""
        config = self.config
        return CachedSamples(
            self.stores.stores, self.facts, seed=config.seed, batch_size=config.batch_size
        )

    def heads(self) -> nn.ModuleDict:
        """A projector for each objective, freshly made."""
        transformer, teacher = self.facts.transformer, self.stores.teacher
        has_features = teacher is not None and "features" in teacher.settings.arrays
        return build_heads(
            self.config,
            transformer["num_attention_heads"] * transformer["attention_head_dim"],
            array_shape(teacher, "features")[-1] if teacher and has_features else None,
            frame_rate=self.stores.frame_rate,
            patch_size_t=self.facts.patch_size_t,
        )

    def training_step(self) -> TrainingStep:
        """The forward pass with its losses."""
        return TrainingStep(
            self.facts,
            build_objectives(self.config),
            layout=self.layout,
            device=self.world.device,
            dtype=self.dtype,
        )

    def batches(self, steps: range) -> BatchLoader:
        """What this rank sees in those steps."""
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

    def log(self, boards: Boards, steps_done: int) -> RunLog:
        """What is written down of every step, going on after `steps_done` of them."""
        config = self.config
        return RunLog(
            config.run_dir,
            steps_done,
            boards,
            check=self.lock.check,
            objectives=config.objectives,
            log_every=config.log_every,
            progress=self.progress,
        )

    def boards(self, steps_done: int) -> Boards:
        """Where curves and videos go besides."""
        config = self.config
        return Boards(
            config.run_dir,
            config.report_to,
            steps_done=steps_done,
            project=config.wandb_project,
            settings=config.model_dump(mode="json"),
        )

    def refuse_ranks_with_other_clips(self) -> None:
        """Refuse stores that changed while the processes opened them; every rank must call this.

        Raises:
            ValueError: a rank found other clips than the others.
        """
        mine = ([digest(of_size.keys) for of_size in self.stores.stores], self.stores.held_out)
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
        """Make the run's folder, or check that it holds this run.

        Args:
            base: folder of the base model, with the transformer's weights.

        Returns:
            What to tell of a run that goes on with fewer clips than it began with.

        Raises:
            ValueError: it holds another run.
            LockLost: another process may be training in it.
        """
        stores = {
            kind: {"folder": reader.name, "settings_hash": reader.settings.hash}
            for kind, reader in self.stores.readers.items()
        }
        about = {
            "provenance": provenance,
            "model": self.model.model_dump(mode="json"),
            "processes": self.world.size,
            "stores": stores,
            "clips": self.stores.clips,
            "left_out": self.stores.left_out.as_dict(),
        }
        settings = fixed_settings(
            self.config,
            self.clips,
            self.facts,
            self.stores,
            base_weights=hash_transformer(base),
        )
        self.lock.check()
        return open_run(
            self.config.run_dir,
            settings,
            resolved_config,
            about,
            clips={of_size.size: of_size.keys for of_size in self.stores.stores},
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
    """Read what is small, and refuse what cannot be trained before anything big is loaded.

    Raises:
        ValueError: settings contradict each other, the stores, or the model.
        CacheError: a store is missing or damaged.
    """
    micro_batch = largest_micro_batch(config.batch_size, config.micro_batch_size, world.size)
    config = config.model_copy(update={"micro_batch_size": micro_batch})
    check_engine_settings(config)
    check_average(config)
    check_boards(config.report_to)
    kinds = kinds_needed(config)
    facts = read_base_facts(resolve_base_model(model, CONFIGURATIONS))
    check_block(config, facts)
    if config.method == "lora":
        check_targets(config.lora, facts.transformer)
    stores = join_buckets(
        cache_root,
        clips.sizes,
        config.stores,
        kinds=kinds,
        leave_out=config.leave_out,
        held_out=config.validation.clips,
        held_out_before=held_out_before(config.run_dir, config.validation.clips),
    )
    for size, of_size in zip(clips.sizes, stores.stores, strict=True):
        check_stores(of_size, facts, size, radius=config.lgf.radius)
    for of_size in stores.stores:
        if of_size.teacher is not None:
            check_teacher(config, of_size.teacher.settings, str(of_size.teacher.path))
    check_validation(config, facts, model, clips.sizes[0])
    if model.is_local:  # others are checked once they are downloaded
        check_base_weights(facts.folder, weights_needed(config))
    return Run(
        config=config,
        clips=clips,
        model=model,
        facts=facts,
        stores=stores,
        layout=TeacherLayout.of(stores.teacher),
        world=world,
        progress=progress,
        lock=RunLock(config.run_dir),
    )


def weights_needed(config: TrainConfig) -> tuple[Part, ...]:
    """Parts of the base model that a run loads the weights of."""
    if config.samples.prompts:
        return ("transformer", "tokenizer", "text_encoder", "vae")
    return ("transformer",)


def check_block(config: TrainConfig, facts: BaseFacts) -> None:
    """Refuse a block that the transformer does not have (`ValueError`)."""
    blocks = facts.transformer["num_layers"]
    if config.objectives and config.block >= blocks:
        raise ValueError(
            f"train.block must be under {blocks}, the base model's number of blocks, got "
            f"{config.block}; it counts from 0, and the presets teach about 0.6 of the depth, "
            f"{int(0.6 * blocks)}"
        )


def check_validation(
    config: TrainConfig, facts: BaseFacts, model: BaseModelConfig, clips: ClipsConfig
) -> None:
    """Refuse what could not be measured or drawn.

    Args:
        clips: the size that is drawn.

    Raises:
        ValueError: naming the field and what would do.
    """
    timesteps, most = config.validation.timesteps, facts.scheduler["num_train_timesteps"] - 1
    if config.validation.clips and (
        not timesteps
        or len(set(timesteps)) < len(timesteps)
        or not all(0 <= timestep <= most for timestep in timesteps)
    ):
        raise ValueError(
            f"train.validation.timesteps must be one or more of 0 to {most}, each once, got "
            f"{list(timesteps)}; [100, 300, 500, 700, 900] is usual"
        )
    samples = config.samples
    if not all(prompt.strip() for prompt in samples.prompts):
        raise ValueError("train.samples.prompts holds an empty prompt; say what to draw")
    if not facts.image_to_video and samples.images:
        raise ValueError(
            f"{model.path} makes video from text alone; leave train.samples.images out"
        )
    if facts.image_to_video and len(samples.images) != len(samples.prompts):
        raise ValueError(
            f"{model.path} makes video from an image: train.samples.images must name one for each "
            f"of the {len(samples.prompts)} prompts, got {len(samples.images)}"
        )
    for image in samples.images:
        first_frame(image, clips)
