"""Memory of a training run: on each GPU, on the host, and on the disk for NVMe offload.

Computed from parameter counts, following the allocations of DeepSpeed 0.19 at each ZeRO stage. The
activations of a micro-batch come from `step_costs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.compute_cost.gpus import GIB
from stages.train_student.config import TrainConfig
from stages.train_student.data.order import accumulation_steps
from stages.train_student.parallel.deepspeed import weights_dtype

FLOAT32 = 4
BUCKET_VALUES = 500_000_000
"""Values per DeepSpeed gradient bucket; its default."""
GATHERED_VALUES = 1_000_000_000
"""Maximum gathered parameters that ZeRO 3 keeps at once; its default."""
SUBGROUP_VALUES = 1_000_000_000
"""Parameters that ZeRO 3 updates at once; its default."""
_SCALE_BLOCK = 256
"""Values per scale in 8-bit moments."""
_SWAP_BUFFERS = 5
"""Host buffers for NVMe offload; DeepSpeed's default."""

LIBRARY_BYTES = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces and NCCL buffers on each GPU: assumed, not measured."""
FRAGMENTED_FRACTION = 0.05
"""Fraction of activations lost to allocator fragmentation: assumed, not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Numbers of parameters of the student."""

    transformer: int
    """Parameters of the base model."""
    adapters: int
    heads: int
    trained: int
    """Trained parameters, of any of these."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.transformer + self.adapters + self.heads


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose; entries of 0 are omitted."""

    gpu: Mapping[str, int]
    """Peak on each GPU, in the backward pass or in the update."""
    host: Mapping[str, int]
    """Per process, without Python and the data loader."""
    disk: Mapping[str, int]
    """Per process, in the offload folder."""


def memory(
    config: TrainConfig,
    counts: ParameterCounts,
    *,
    processes: int,
    activation_bytes: int,
    batch_bytes: int,
) -> MemoryEstimate:
    """Estimate the memory of each process, with one GPU each.

    Args:
        config: ZeRO stage, offload, dtypes, optimiser and EMA.
        counts: Parameter counts of the student.
        processes: Number of processes that share the optimiser states.
        activation_bytes: `StepCost.activation_bytes` of a micro-batch.
        batch_bytes: `StepCost.batch_bytes` of a micro-batch.
    """
    deepspeed = config.deepspeed
    stage, itemsize = deepspeed.zero_stage, weights_dtype(deepspeed).itemsize
    trained_here = counts.trained / (processes if stage else 1)
    gpu: dict[str, float] = {"libraries, assumed": LIBRARY_BYTES}
    host: dict[str, float] = {}
    disk: dict[str, float] = {}
    by_place: dict[str, dict[str, float]] = {"none": gpu, "cpu": host, "nvme": disk}

    # Present at all times.
    weights_here = counts.total / (processes if stage == 3 else 1) * itemsize
    by_place[deepspeed.offload_parameters]["weights"] = weights_here
    optimizer = by_place[deepspeed.offload_optimizer]
    # With ZeRO 3, float32 weights need no separate master copy.
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

    # The larger of two peaks.
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
    """Return the bytes of the optimiser's two moments for a number of parameters."""
    if config.optimizer.name == "adamw8bit":
        return 2 * values * (1 + FLOAT32 / _SCALE_BLOCK)
    return 2 * FLOAT32 * values


def checkpoint_bytes(config: TrainConfig, counts: ParameterCounts) -> int:
    """Return the size of a checkpoint of all processes: weights, optimiser states, EMA.

    With LoRA the frozen weights are not included.
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
    """Add the gradients kept until the update to the device that holds them."""
    deepspeed = config.deepspeed
    stage, itemsize = deepspeed.zero_stage, weights_dtype(deepspeed).itemsize
    if stage in (0, 1):
        # Complete on every rank; bf16 gradients also accumulate in float32.
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
        waiting += itemsize * trained_here  # accumulated gradients of earlier micro-batches
    by_place["cpu" if offloaded else "none"]["gradients"] = waiting


def _communication_bytes(
    config: TrainConfig, counts: ParameterCounts, processes: int, itemsize: int
) -> float:
    """Return the bytes of gradient communication buffers."""
    stage = config.deepspeed.zero_stage
    if stage == 0 or (stage == 1 and itemsize < FLOAT32):
        # All gradients are present and are flattened bucket by bucket.
        return FLOAT32 * min(counts.trained, BUCKET_VALUES) if processes > 1 else 0
    # Allocated in full, regardless of the number of trained parameters; ZeRO 3 flattens each
    # bucket into another buffer.
    bucket = BUCKET_VALUES * itemsize
    return bucket + min(counts.trained, BUCKET_VALUES) * itemsize if stage == 3 else bucket


def _update_bytes(config: TrainConfig, trained_here: float) -> float:
    """Return AdamW's temporary bytes: the square root of the second moment."""
    if config.deepspeed.offload_optimizer != "none" or config.optimizer.name == "adamw8bit":
        return 0
    if config.deepspeed.zero_stage == 3:
        return 2 * FLOAT32 * min(trained_here, SUBGROUP_VALUES)
    return FLOAT32 * trained_here


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items() if round(size)}
