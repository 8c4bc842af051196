"""Estimate of a probe: what it would read and compute. Loads no weights and writes nothing.

FLOPs and memory come from shapes: the transformer and the linear map are built on torch's meta
device, and the probe's own functions run there. Time is FLOPs / (the device's measured matmul rate
* a typical fraction of it), without reading clips and weights.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.clips.config import ClipsConfig
from stages.compute_cost.flop_counter import (
    TRANSFORMER_RATE_FRACTION,
    FlopCounter,
    matmul_flops_per_second,
)
from stages.config import BaseModelConfig
from stages.probe_blocks.blockwise import TokenState
from stages.probe_blocks.clips import choose_clips
from stages.probe_blocks.config import ProbeConfig
from stages.probe_blocks.fit import ProbeItem
from stages.probe_blocks.probe import check_settings, linear_heads, linear_probe, token_bytes
from stages.students.experts import trained_configs
from stages.students.registry import with_blocks
from stages.students.student import StudentConfigs
from stages.students.weights import parts_are_here
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.data.stores import Buckets
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.parallel.deepspeed import weights_dtype
from stages.train_student.parallel.process_group import world_from_environment
from stages.train_student.setup import open_checked_stores
from stages.train_student.step import StudentInputs, TrainingStep
from stages.train_student.step_costs import batch_bytes, meta_batch, meta_student

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeEstimate:
    """Estimate of a whole probe, without blocks that are measured already being left out."""

    blocks: tuple[int, ...]
    """Blocks to probe."""
    num_blocks: int
    """Blocks of the base model."""
    num_blocks_passed: int
    """Blocks that the tokens pass: up to the last one to probe."""
    timesteps: tuple[int, ...]
    clips: int
    """Clips to fit on."""
    held_out: int
    """Clips to measure on."""
    read_bytes: int
    """Bytes of these clips in the cache."""
    token_bytes: int
    """Host memory for the tokens of all clips and timesteps, between two blocks."""
    sample_bytes: int
    """Host memory for their latents, text and teacher."""
    block_bytes: int
    """Weights of one block on the device."""
    activation_bytes: int
    """Peak of activations on the device, of a block or of the fit."""
    pass_flops: float
    """FLOPs of passing all tokens through the blocks."""
    fit_flops: float
    """FLOPs of fitting and measuring the linear maps."""
    device: str
    flops_per_second: float
    """Matmul rate measured on this device."""
    assumed_peak_fraction: float
    """Assumed fraction of that rate."""

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.pass_flops + self.fit_flops

    @property
    def seconds(self) -> float:
        """Time of the computation on this device."""
        return self.flops / (self.flops_per_second * self.assumed_peak_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PassCost:
    """FLOPs of one clip at one timestep, and memory."""

    embed_flops: float
    block_flops: float
    fit_flops: float
    """One step of the fit."""
    measure_flops: float
    activation_bytes: int
    block_bytes: int


def estimate_probe(
    config: ProbeConfig,
    train: TrainConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path | str,
) -> ProbeEstimate:
    """Check all settings, and estimate `probe_blocks` with the same arguments.

    Raises:
        ValueError: settings contradict each other, the stores or the model.
        CacheError: a store is missing or damaged.
    """
    train = train.model_copy(
        update={"objectives": ("lgf",), "method": "full", "gradient_checkpointing": False}
        | {"micro_batch_size": 1}
    )
    configs = trained_configs(model)
    check_settings(config, train, configs)
    stores = open_checked_stores(train, clips, configs, cache_root)
    chosen = choose_clips(config, stores)
    parts_are_here(model, configs.folder, (configs.transformer_part,))
    num_blocks = configs.num_blocks
    blocks = tuple(sorted(config.blocks)) or tuple(range(num_blocks))
    passed, at_times = blocks[-1] + 1, len(config.timesteps)
    tokens = samples = read = activations = block = 0
    pass_flops = fit_flops = 0.0
    for size, joined in zip(clips.sizes, stores.stores, strict=True):
        of_size = [key for key in chosen if key in joined.readers["latents"]]
        if not of_size:
            continue
        assert joined.teacher is not None, "the objective reads a teacher"
        batch = meta_batch(train, configs, size, joined.teacher.settings, None)
        cost = _cost(config, train, configs, stores, batch)
        passes = len(of_size) * at_times
        measured = sum(key in of_size for key in chosen[: config.held_out]) * at_times
        steps = config.fit_steps * len(of_size) / len(chosen)
        pass_flops += passes * (cost.embed_flops + passed * cost.block_flops)
        fit_flops += len(blocks) * (steps * cost.fit_flops + measured * cost.measure_flops)
        tokens += token_bytes({"": [batch] * passes}, train, configs)
        samples += passes * batch_bytes(batch)
        read += sum(
            array.bytes
            for reader in joined.readers.values()
            for key in of_size
            for array in reader.record(key).arrays.values()
        )
        activations, block = max(activations, cost.activation_bytes), cost.block_bytes
    device = world_from_environment().device
    return ProbeEstimate(
        blocks=blocks,
        num_blocks=num_blocks,
        num_blocks_passed=passed,
        timesteps=config.timesteps,
        clips=config.clips,
        held_out=config.held_out,
        read_bytes=read,
        token_bytes=tokens,
        sample_bytes=samples,
        block_bytes=block,
        activation_bytes=activations,
        pass_flops=pass_flops,
        fit_flops=fit_flops,
        device=str(device),
        flops_per_second=matmul_flops_per_second(device, weights_dtype(train.deepspeed)),
        assumed_peak_fraction=TRANSFORMER_RATE_FRACTION[device.type],
    )


def _cost(
    config: ProbeConfig,
    train: TrainConfig,
    configs: StudentConfigs,
    stores: Buckets,
    batch: Batch,
) -> _PassCost:
    one, inputs, one_weights = _forward(train, configs, stores, batch, 1)
    two, _, two_weights = _forward(train, configs, stores, batch, 2)
    block_flops = two.flops - one.flops
    probe = linear_probe(config, train, configs, stores, _META)
    with _META:
        (head,) = linear_heads(train, configs, frame_rate=stores.frame_rate).values()
    state = TokenState(
        tokens_BND=torch.empty(1, math.prod(inputs.token_grid), configs.width, device=_META),
        text_BLD=inputs.transformer["encoder_hidden_states"],
        constants=((), {}),
    )
    item = ProbeItem(key="", batch=batch, state=state)
    # First with gradients: what the step keeps from inference could not be used with them.
    with FlopCounter(training=True) as fitted:
        probe.loss(head, item, batch).sum().backward()
    with FlopCounter() as measured:
        probe.loss(head, item, batch)
    return _PassCost(
        embed_flops=one.flops - block_flops,
        block_flops=block_flops,
        fit_flops=fitted.flops,
        measure_flops=measured.flops,
        activation_bytes=max(one.peak_bytes, fitted.peak_bytes),
        block_bytes=two_weights - one_weights,
    )


def _forward(
    train: TrainConfig, configs: StudentConfigs, stores: Buckets, batch: Batch, num_blocks: int
) -> tuple[FlopCounter, StudentInputs, int]:
    """A pass through so many blocks, the model's inputs, and the bytes of its weights."""
    assert stores.teacher is not None, "the objective reads a teacher"
    shallow = with_blocks(configs, num_blocks)
    student = meta_student(train.model_copy(update={"objectives": (), "block": 0}), shallow)
    step = TrainingStep(
        configs,
        (),
        layout=TeacherLayout.of(stores.teacher.settings),
        device=_META,
        dtype=weights_dtype(train.deepspeed),
    )
    inputs = step.inputs(batch)
    with FlopCounter() as counter:
        student(*inputs)
    weights = sum(one.numel() * one.element_size() for one in student.parameters())
    return counter, inputs, weights
