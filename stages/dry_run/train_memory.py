"""What a training keeps in memory: on each GPU, on the host, on the disk it offloads to.

Arithmetic on counts of parameters, after what DeepSpeed 0.19 allocates at each ZeRO stage; what a
micro-batch takes comes from `step_costs`. `estimate` asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.compute_cost.gpus import GIB
from stages.train_student.config import TrainConfig
from stages.train_student.data.order import accumulation_steps
from stages.train_student.parallel.deepspeed import weights_dtype

FLOAT32 = 4
BUCKET_VALUES = 500_000_000
"""Values in DeepSpeed's buffers for gradients on their way; its default."""
GATHERED_VALUES = 1_000_000_000
"""Values of gathered weights that ZeRO 3 keeps at once; its default."""
SUBGROUP_VALUES = 1_000_000_000
"""Values that ZeRO 3 updates at once; its default."""
_SCALE_BLOCK = 256
"""Values that share a scale in 8-bit moments."""
_SWAP_BUFFERS = 5
"""Buffers on the host between a disk and the device; DeepSpeed's default."""

LIBRARY_BYTES = int(1.5 * GIB)
"""CUDA's context, workspaces of cuBLAS and buffers of NCCL on each GPU: assumed, not measured."""
FRAGMENTED_FRACTION = 0.05
"""Share of activations that the allocator cannot use again: assumed, not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """How many weights the student has."""

    transformer: int
    """The base model's own."""
    adapters: int
    heads: int
    trained: int
    """Of all of them."""

    @property
    def total(self) -> int:
        """All weights."""
        return self.transformer + self.adapters + self.heads


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes by what they are for; parts of 0 are left out."""

    gpu: Mapping[str, int]
    """On each GPU at its fullest moment, in the backward pass or in the update."""
    host: Mapping[str, int]
    """Of each process, beside what Python and the loader take."""
    disk: Mapping[str, int]
    """Of each process, in the folder that is offloaded to."""

    @property
    def gpu_bytes(self) -> int:
        """On each GPU."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """Of each process."""
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> int:
        """Of each process."""
        return sum(self.disk.values())


def memory(
    config: TrainConfig,
    counts: ParameterCounts,
    *,
    processes: int,
    activation_bytes: int,
    batch_bytes: int,
) -> MemoryEstimate:
    """Reckon what every process needs; one GPU each.

    Args:
        config: ZeRO stage, offload, formats, optimiser, average.
        counts: of the student.
        processes: that share the states.
        activation_bytes: of a micro-batch: `StepCost.activation_bytes`.
        batch_bytes: of a micro-batch: `StepCost.batch_bytes`.
    """
    deepspeed = config.deepspeed
    stage, itemsize = deepspeed.zero_stage, weights_dtype(deepspeed).itemsize
    trained_here = counts.trained / (processes if stage else 1)
    gpu: dict[str, float] = {"libraries, assumed": LIBRARY_BYTES}
    host: dict[str, float] = {}
    disk: dict[str, float] = {}
    by_place: dict[str, dict[str, float]] = {"none": gpu, "cpu": host, "nvme": disk}

    # Whatever moment it is.
    weights_here = counts.total / (processes if stage == 3 else 1) * itemsize
    by_place[deepspeed.offload_parameters]["weights"] = weights_here
    optimizer = by_place[deepspeed.offload_optimizer]
    # float32 weights of ZeRO 3 are their own master copy.
    if itemsize < FLOAT32 or stage in (1, 2):
        optimizer["float32 weights"] = FLOAT32 * trained_here
    optimizer["moments"] = moment_bytes(config, trained_here)
    if config.ema.decay is not None:
        averaged = counts.trained / processes
        (host if deepspeed.offload_optimizer != "none" else gpu)["average"] = FLOAT32 * averaged
    _gradients(config, counts, processes, trained_here, by_place)
    if stage < 3:
        host["weights, while they load"] = counts.transformer * itemsize
    if deepspeed.offload_optimizer == "nvme":
        host["buffers to the disk"] = _SWAP_BUFFERS * FLOAT32 * min(trained_here, SUBGROUP_VALUES)

    # The fuller of two moments.
    backward: dict[str, float] = {
        "activations": activation_bytes,
        "fragmentation, assumed": FRAGMENTED_FRACTION * activation_bytes,
        "batch": batch_bytes,
        "communication": _communication_bytes(config, counts, processes, itemsize),
    }
    if stage == 3:
        backward["gathered weights"] = min(counts.total, GATHERED_VALUES) * itemsize
    update = {"update": _update_bytes(config, trained_here)}
    gpu |= backward if sum(backward.values()) >= sum(update.values()) else update
    return MemoryEstimate(gpu=_rounded(gpu), host=_rounded(host), disk=_rounded(disk))


def moment_bytes(config: TrainConfig, values: float) -> float:
    """The optimiser's two moments of so many weights."""
    if config.optimizer.name == "adamw8bit":
        return 2 * values * (1 + FLOAT32 / _SCALE_BLOCK)
    return 2 * FLOAT32 * values


def checkpoint_bytes(config: TrainConfig, counts: ParameterCounts) -> int:
    """One checkpoint of all processes together: weights, optimiser, average.

    With adapters the frozen weights are left out.
    """
    kept = counts.trained if config.method == "lora" else counts.total
    weights = kept * weights_dtype(config.deepspeed).itemsize
    states = moment_bytes(config, counts.trained)
    if config.deepspeed.zero_stage:
        states += FLOAT32 * counts.trained
    average = FLOAT32 * counts.trained if config.ema.decay is not None else 0
    return round(weights + states + average)


def _gradients(
    config: TrainConfig,
    counts: ParameterCounts,
    processes: int,
    trained_here: float,
    by_place: Mapping[str, dict[str, float]],
) -> None:
    """Gradients that wait for the update, into the place where they wait."""
    deepspeed = config.deepspeed
    stage, itemsize = deepspeed.zero_stage, weights_dtype(deepspeed).itemsize
    if stage in (0, 1):
        # Whole on every rank; with bf16 weights they add up in float32 beside the newest.
        by_place["none"]["gradients"] = counts.trained * (
            FLOAT32 if itemsize == FLOAT32 else FLOAT32 + itemsize
        )
        if deepspeed.offload_optimizer != "none":
            by_place["cpu"]["gradients"] = FLOAT32 * trained_here
        return
    offloaded = deepspeed.offload_optimizer != "none"
    waiting = FLOAT32 * trained_here
    passes = accumulation_steps(config.batch_size, config.micro_batch_size, processes)
    if offloaded and stage == 2 and passes > 1:
        waiting += itemsize * trained_here  # the sum of the passes before
    by_place["cpu" if offloaded else "none"]["gradients"] = waiting


def _communication_bytes(
    config: TrainConfig, counts: ParameterCounts, processes: int, itemsize: int
) -> float:
    """Buffers in which gradients travel."""
    stage = config.deepspeed.zero_stage
    if stage == 0 or (stage == 1 and itemsize < FLOAT32):
        # All gradients are there, and are flattened bucket by bucket.
        return FLOAT32 * min(counts.trained, BUCKET_VALUES) if processes > 1 else 0
    # Allocated whole, however few weights are trained; ZeRO 3 flattens each bucket once more.
    bucket = BUCKET_VALUES * itemsize
    return bucket + min(counts.trained, BUCKET_VALUES) * itemsize if stage == 3 else bucket


def _update_bytes(config: TrainConfig, trained_here: float) -> float:
    """What AdamW takes beside its states: the square root of the second moment."""
    if config.deepspeed.offload_optimizer != "none" or config.optimizer.name == "adamw8bit":
        return 0
    if config.deepspeed.zero_stage == 3:
        return 2 * FLOAT32 * min(trained_here, SUBGROUP_VALUES)
    return FLOAT32 * trained_here


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items() if round(size)}
