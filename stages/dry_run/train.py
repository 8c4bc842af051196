"""Estimate of a training run: parameters, memory, and time per step.

Parameters and FLOPs come from shapes, built from the base model's configuration files; memory is
computed from them (`train_memory`). Time is a step's FLOPs / (the GPU's peak rate * an assumed
fraction of it). If a step does not fit into GPU memory, settings are tried in turn until one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter, or_

from cache_schema import StoreSettings
from stages.clips.config import ClipsConfig
from stages.compute_cost.gpus import Gpu
from stages.dry_run.train_memory import (
    MemoryEstimate,
    ParameterCounts,
    checkpoint_bytes,
    memory,
)
from stages.students.student import StudentConfigs
from stages.train_student.config import TrainConfig
from stages.train_student.data.order import accumulation_steps, largest_micro_batch
from stages.train_student.step_costs import StepCost, meta_student, step_cost

ASSUMED_PEAK_FRACTION = 0.4
"""Assumed fraction of a GPU's peak rate that a step reaches, with communication and loading."""

Settings = dict[str, str | int | bool]
"""Values by dotted name within `train`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedStores:
    """A clip size, and the settings of its stores, which need not exist."""

    size: ClipsConfig
    teacher: StoreSettings | None
    """Settings of the teacher or Gram-flow store; None if no objective reads it."""
    masks: StoreSettings | None
    visual: StoreSettings | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """Changed settings with which the training fits into GPU memory."""

    settings: Settings
    gpu_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEstimate:
    """Estimate of a training run. Fields and properties are the keys of `--json`."""

    parameters: ParameterCounts
    costs: tuple[StepCost, ...]
    """Cost of a clip of each size, in the order of the sizes."""
    passes: int
    """Micro-batches per GPU and step."""
    step_flops: float
    """FLOPs of a step on all GPUs, including recomputation; the mean over the sizes."""
    memory: MemoryEstimate
    """Memory for the largest size."""
    checkpoint_bytes: int
    gpu: str | None
    """Name of the GPU model; None if unknown."""
    gpu_memory_bytes: int | None
    gpus: int
    seconds_per_step: float | None
    """At `ASSUMED_PEAK_FRACTION` of the peak rate; None if the GPU is unknown."""
    seconds: float | None
    """For all steps."""
    remedy: Remedy | None
    """If it does not fit, the first change that makes it fit; None if none was found."""

    @property
    def gpu_bytes(self) -> int:
        """Peak bytes on each GPU."""
        return sum(self.memory.gpu.values())

    @property
    def host_bytes_per_process(self) -> int:
        """Bytes of host memory per process."""
        return sum(self.memory.host.values())

    @property
    def fits(self) -> bool | None:
        """Whether a step fits into GPU memory; None if the GPU is unknown."""
        return None if self.gpu_memory_bytes is None else self.gpu_bytes <= self.gpu_memory_bytes


def estimate(
    config: TrainConfig,
    configs: StudentConfigs,
    stores: Sequence[SizedStores],
    *,
    gpu: Gpu | None,
    gpus: int,
) -> TrainEstimate:
    """Estimate a training run with one process per GPU.

    Args:
        config: Training settings.
        configs: Configuration of the base model.
        stores: One entry per clip size.
        gpu: GPU model; None if unknown.
        gpus: Number of GPUs.

    Raises:
        ValueError: The settings do not match the model or the number of GPUs, with the message of
            the run itself.
    """
    config = _with_micro_batch(config, gpus)
    cost_cache = _CostCache(configs, stores)
    counts, costs = cost_cache.costs(config)
    step_flops = sum(cost.flops_per_clip for cost in costs) / len(costs) * config.batch_size
    seconds, remedy = None, None
    needed = cost_cache.memory(config, gpus)
    if gpu is not None:
        peak = gpu.bf16_flops if config.deepspeed.precision == "bf16" else gpu.fp32_flops
        seconds = step_flops / (gpus * peak * ASSUMED_PEAK_FRACTION)
        if sum(needed.gpu.values()) > gpu.memory_bytes:
            remedy = _remedy(config, cost_cache, gpu, gpus)
    return TrainEstimate(
        parameters=counts,
        costs=costs,
        passes=accumulation_steps(config.batch_size, config.micro_batch_size, gpus),
        step_flops=step_flops,
        memory=needed,
        checkpoint_bytes=checkpoint_bytes(config, counts),
        gpu=None if gpu is None else gpu.name,
        gpu_memory_bytes=None if gpu is None else gpu.memory_bytes,
        gpus=gpus,
        seconds_per_step=seconds,
        seconds=None if seconds is None else seconds * config.steps,
        remedy=remedy,
    )


def _with_micro_batch(config: TrainConfig, gpus: int) -> TrainConfig:
    clips = largest_micro_batch(config.batch_size, config.micro_batch_size, gpus)
    return config.model_copy(update={"micro_batch_size": clips})


class _CostCache:
    """Costs of the tried configurations, which share most of them."""

    def __init__(self, configs: StudentConfigs, stores: Sequence[SizedStores]) -> None:
        self._configs = configs
        self._stores = stores
        self._costs: dict[tuple[object, ...], tuple[ParameterCounts, tuple[StepCost, ...]]] = {}

    def costs(self, config: TrainConfig) -> tuple[ParameterCounts, tuple[StepCost, ...]]:
        """Return the student's parameter counts, and the cost of a clip of each size."""
        key = (config.method, config.gradient_checkpointing, config.micro_batch_size)
        if key not in self._costs:
            self._costs[key] = (
                parameter_counts(
                    config, self._configs, self._stores[0].teacher, self._stores[0].visual
                ),
                tuple(
                    step_cost(
                        config,
                        self._configs,
                        one.size,
                        teacher=one.teacher,
                        visual=one.visual,
                        masks=one.masks,
                    )
                    for one in self._stores
                ),
            )
        return self._costs[key]

    def memory(self, config: TrainConfig, gpus: int) -> MemoryEstimate:
        """Return the memory for the largest size."""
        counts, costs = self.costs(config)
        return memory(
            config,
            counts,
            processes=gpus,
            activation_bytes=max(cost.activation_bytes for cost in costs),
            batch_bytes=max(cost.batch_bytes for cost in costs),
        )


def parameter_counts(
    config: TrainConfig,
    configs: StudentConfigs,
    teacher: StoreSettings | None,
    visual: StoreSettings | None = None,
) -> ParameterCounts:
    """Count the student's parameters on the meta device."""
    student = meta_student(config, configs, teacher, visual)
    adapters = sum(
        parameter.numel()
        for name, parameter in student.transformer.named_parameters()
        if "lora_" in name
    )
    heads = sum(parameter.numel() for parameter in student.heads.parameters())
    total = sum(parameter.numel() for parameter in student.parameters())
    return ParameterCounts(
        transformer=total - adapters - heads,
        adapters=adapters,
        heads=heads,
        trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
    )


_REMEDIES: tuple[Settings, ...] = (
    {"gradient_checkpointing": True},
    {"micro_batch_size": 1},
    {"deepspeed.zero_stage": 2},
    {"deepspeed.zero_stage": 3},
    {"optimizer.name": "adamw8bit"},
    {"deepspeed.offload_optimizer": "cpu"},
    {"deepspeed.zero_stage": 3, "deepspeed.offload_parameters": "cpu"},
)
"""Changed settings, from least to most costly."""


def _remedy(config: TrainConfig, cost_cache: _CostCache, gpu: Gpu, gpus: int) -> Remedy | None:
    """Return the first changes that fit: each step alone, then each with all before it."""
    steps = [changes for step in _REMEDIES if (changes := _changes(config, step))]
    for settings in (*steps, *accumulate(steps, or_)):
        changed = _with_micro_batch(_changed(config, settings), gpus)
        needed = sum(cost_cache.memory(changed, gpus).gpu.values())
        if needed <= gpu.memory_bytes:
            return Remedy(settings=settings, gpu_bytes=needed)
    return None


def _changes(config: TrainConfig, step: Settings) -> Settings:
    """Return the settings of a step that change anything; a ZeRO stage is never lowered."""
    stage = config.deepspeed.zero_stage
    return {
        name: value
        for name, value in step.items()
        if attrgetter(name)(config) != value
        and not (name == "deepspeed.zero_stage" and int(value) < stage)
    }


def _changed(config: TrainConfig, settings: Settings) -> TrainConfig:
    values = config.model_dump()
    for name, value in settings.items():
        *sections, key = name.split(".")
        section = values
        for inner in sections:
            section = section[inner]
        section[key] = value
    return TrainConfig.model_validate(values)
