"""Estimate of a training run: parameters, memory, and time per step.

Parameters and FLOPs come from shapes, built from the base model's configuration files; memory is
computed from them (`train_memory`). Time is a step's FLOPs / (the GPU's peak rate * an assumed
fraction of it). If a step does not fit into GPU memory, settings are tried in turn until one does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cache_schema import StoreSettings
from stages.clips.config import ClipsConfig
from stages.cogvideox.configs import CogVideoXConfigs
from stages.compute_cost.gpus import Gpu
from stages.dry_run.train_memory import (
    MemoryEstimate,
    ParameterCounts,
    checkpoint_bytes,
    memory,
)
from stages.train_student.config import TrainConfig
from stages.train_student.data.order import accumulation_steps, largest_micro_batch
from stages.train_student.step_costs import StepCost, meta_student, step_cost

ASSUMED_PEAK_FRACTION = 0.4
"""Assumed fraction of a GPU's peak rate that a step reaches, with communication and loading."""
MAX_GPUS = 64
"""Maximum number of GPUs that is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedStores:
    """A clip size, and the settings of its stores, which need not exist."""

    size: ClipsConfig
    teacher: StoreSettings | None
    """Settings of the teacher or Gram-flow store; None if no objective reads it."""
    masks: StoreSettings | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """Changed settings with which the training fits into GPU memory."""

    settings: Mapping[str, str | int | bool]
    """Values by dotted name within `train`."""
    gpus: int
    memory: MemoryEstimate


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEstimate:
    """Estimate of a training run."""

    counts: ParameterCounts
    costs: tuple[StepCost, ...]
    """Cost of a clip of each size, in the order of the sizes."""
    passes: int
    """Micro-batches per GPU and step."""
    step_flops: float
    """FLOPs of a step on all GPUs, including recomputation; the mean over the sizes."""
    memory: MemoryEstimate
    """Memory for the largest size."""
    checkpoint_bytes: int
    gpu: Gpu | None
    gpus: int
    seconds_per_step: float | None
    """At `ASSUMED_PEAK_FRACTION` of the peak rate; None if the GPU is unknown."""
    fits: bool | None
    """Whether a step fits into GPU memory; None if the GPU is unknown."""
    remedy: Remedy | None
    """If it does not fit, the first change that makes it fit; None if none was found."""


def estimate(
    config: TrainConfig,
    configs: CogVideoXConfigs,
    stores: Sequence[SizedStores],
    *,
    gpu: Gpu | None,
    gpus: int,
) -> TrainEstimate:
    """Estimate a training run with one process per GPU.

    Args:
        config: Training settings.
        facts: Configuration of the base model.
        stores: One entry per clip size.
        gpu: GPU model; None if unknown.
        gpus: Number of GPUs.

    Raises:
        ValueError: The settings do not match the model or the number of GPUs, with the message of
            the run itself.
    """
    config = _with_micro_batch(config, gpus)
    passes = accumulation_steps(config.batch_size, config.micro_batch_size, gpus)
    cost_cache = _CostCache(configs, stores)
    costs = cost_cache.costs(config)
    needed = cost_cache.memory(config, gpus)
    mean_flops = sum(cost.flops_per_clip for cost in costs) / len(costs)
    step_flops = mean_flops * config.batch_size
    seconds = None
    if gpu is not None:
        peak = gpu.bf16_flops if config.deepspeed.precision == "bf16" else gpu.fp32_flops
        seconds = step_flops / (gpus * peak * ASSUMED_PEAK_FRACTION)
    fits = None if gpu is None else needed.gpu_bytes <= gpu.memory_bytes
    counts = cost_cache.counts(config)
    return TrainEstimate(
        counts=counts,
        costs=costs,
        passes=passes,
        step_flops=step_flops,
        memory=needed,
        checkpoint_bytes=checkpoint_bytes(config, counts),
        gpu=gpu,
        gpus=gpus,
        seconds_per_step=seconds,
        fits=fits,
        remedy=_remedy(config, cost_cache, gpu, gpus) if gpu is not None and not fits else None,
    )


def _with_micro_batch(config: TrainConfig, gpus: int) -> TrainConfig:
    clips = largest_micro_batch(config.batch_size, config.micro_batch_size, gpus)
    return config.model_copy(update={"micro_batch_size": clips})


class _CostCache:
    """Costs of the tried configurations, cached."""

    def __init__(self, configs: CogVideoXConfigs, stores: Sequence[SizedStores]) -> None:
        self._facts = configs
        self._stores = stores
        self._costs: dict[tuple[object, ...], tuple[StepCost, ...]] = {}
        self._counts: dict[tuple[object, ...], ParameterCounts] = {}

    def costs(self, config: TrainConfig) -> tuple[StepCost, ...]:
        """Return the cost of a clip of each size."""
        key = (config.method, config.gradient_checkpointing, config.micro_batch_size)
        if key not in self._costs:
            self._costs[key] = tuple(
                step_cost(config, self._facts, one.size, teacher=one.teacher, masks=one.masks)
                for one in self._stores
            )
        return self._costs[key]

    def counts(self, config: TrainConfig) -> ParameterCounts:
        """Return the student's parameter counts."""
        key = (config.method,)
        if key not in self._counts:
            self._counts[key] = parameter_counts(config, self._facts, self._stores[0].teacher)
        return self._counts[key]

    def memory(self, config: TrainConfig, gpus: int) -> MemoryEstimate:
        """Return the memory for the largest size."""
        costs = self.costs(config)
        return memory(
            config,
            self.counts(config),
            processes=gpus,
            activation_bytes=max(cost.activation_bytes for cost in costs),
            batch_bytes=max(cost.batch_bytes for cost in costs),
        )


def parameter_counts(
    config: TrainConfig, configs: CogVideoXConfigs, teacher: StoreSettings | None
) -> ParameterCounts:
    """Count the student's parameters on the meta device."""
    student = meta_student(config, configs, teacher)
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


def _remedy(config: TrainConfig, cost_cache: _CostCache, gpu: Gpu, gpus: int) -> Remedy | None:
    """Return the first of `_candidates` that fits."""
    for settings, number in _candidates(config, gpus):
        if config.batch_size % number:
            continue
        changed = _with_micro_batch(changed_config(config, settings), number)
        needed = cost_cache.memory(changed, number)
        if needed.gpu_bytes <= gpu.memory_bytes:
            return Remedy(settings=settings, gpus=number, memory=needed)
    return None


_REMEDIES: tuple[dict[str, str | int | bool], ...] = (
    {"gradient_checkpointing": True},
    {"micro_batch_size": 1},
    {"deepspeed.zero_stage": 2},
    {"deepspeed.zero_stage": 3},
    {"optimizer.name": "adamw8bit"},
    {"deepspeed.offload_optimizer": "cpu"},
    {"deepspeed.zero_stage": 3, "deepspeed.offload_parameters": "cpu"},
)
"""Changes from least to most costly. Each is tried alone, then with all before it."""


def _candidates(
    config: TrainConfig, gpus: int
) -> Iterator[tuple[dict[str, str | int | bool], int]]:
    steps = [changes for step in _REMEDIES if (changes := _changes(config, step))]
    together = [_merged(steps[: number + 1]) for number in range(len(steps))]
    ways = [*steps, *together]
    lora: dict[str, str | int | bool] = {"method": "lora"} if config.method == "full" else {}
    yield from ((way, gpus) for way in ways)
    if lora:
        yield from ((lora | way, gpus) for way in ({}, *ways))
    more = 2 * gpus
    while more <= MAX_GPUS:
        yield from ((way, more) for way in ({}, *ways))
        more *= 2


def _changes(
    config: TrainConfig, step: Mapping[str, str | int | bool]
) -> dict[str, str | int | bool]:
    """Return the settings of a step that change anything; a ZeRO stage is never lowered."""
    changed = {name: value for name, value in step.items() if _value(config, name) != value}
    wanted = changed.get("deepspeed.zero_stage")
    if isinstance(wanted, int) and wanted < config.deepspeed.zero_stage:
        del changed["deepspeed.zero_stage"]
    return changed


def _merged(steps: Sequence[Mapping[str, str | int | bool]]) -> dict[str, str | int | bool]:
    return {name: value for step in steps for name, value in step.items()}


def _value(config: TrainConfig, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def changed_config(config: TrainConfig, settings: Mapping[str, object]) -> TrainConfig:
    """Return the configuration with settings changed, given by dotted names."""
    values = config.model_dump()
    for name, value in settings.items():
        section, *inner = name.split(".")
        if inner:
            values[section] = values[section] | {inner[0]: value}
        else:
            values[section] = value
    return TrainConfig.model_validate(values)
