"""The DeepSpeed engine around the student: its configuration, optimiser and learning rate.

The only file that imports DeepSpeed, and only when an engine is made: the import takes seconds.
"""

import collections
import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.train_student.config import DeepSpeedConfig, OptimizerConfig, TrainConfig
from stages.train_student.data.order import accumulation_steps
from stages.train_student.distributed import World
from stages.train_student.student import Student


def check_engine_settings(config: TrainConfig, world_size: int) -> None:
    """Refuse what no engine can do, before anything is loaded.

    Raises:
        ValueError: naming the fields and what would do.
    """
    accumulation_steps(config.batch_size, config.micro_batch_size, world_size)
    deepspeed = config.deepspeed
    if deepspeed.zero_stage == 0 and deepspeed.precision == "bf16":
        raise ValueError(
            "train.deepspeed.zero_stage 0 keeps no float32 copy of bf16 weights, which small "
            "updates need; set zero_stage to 1 or more, or precision to fp32"
        )
    if deepspeed.zero_stage == 0 and deepspeed.offload_optimizer != "none":
        raise ValueError(
            "train.deepspeed.offload_optimizer needs zero_stage 1 or more, got 0; 2 is usual"
        )


def weights_dtype(config: DeepSpeedConfig) -> torch.dtype:
    """Format of the weights in the forward and backward pass."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def learning_rate_factor(step: int, config: OptimizerConfig, steps: int) -> float:
    """Share of the peak rate at `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    share = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


@contextmanager
def deepspeed_engine(student: Student, config: TrainConfig, world: World) -> Iterator[Any]:
    """A DeepSpeed engine for the length of the block; the process group ends with it.

    It drives torch's own AdamW: DeepSpeed's would be compiled on first use. Inside the block the
    standard output goes to the error stream, since DeepSpeed prints to it at any time.
    """
    deepspeed = _import_deepspeed()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.optimizer, config.steps)
    )
    linear = nn.functional.linear
    with _local_rank_in_environment(world), _quiet():
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
        )
        try:
            engine, *_ = deepspeed.initialize(
                model=student,
                model_parameters=parameters,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=deepspeed_settings(config, world.size),
            )
            try:
                yield engine
            finally:
                engine.destroy()
        finally:
            # ZeRO 3 leaves its own in place, which rounds differently: what runs in this process
            # afterwards must not.
            nn.functional.linear = linear
            # DeepSpeed keeps handles on the group: it must end the group itself to drop them.
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None


def deepspeed_settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, in its own words."""
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage}
    if config.deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(
            config.batch_size, config.micro_batch_size, world_size
        ),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.deepspeed.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def gradient_norm_before_step(engine: Any) -> float | None:
    """Norm of the gradients where DeepSpeed itself reports none (ZeRO 0); None elsewhere."""
    if engine.zero_optimization_stage() != 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters for the length of the block, on every rank, whatever the ZeRO stage."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    with _import_deepspeed().zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what DeepSpeed prints to the error stream: the standard output is for results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        yield


def _import_deepspeed() -> Any:
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed
        import deepspeed.ops
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:  # its own, bound to the standard output
            handler.setStream(sys.stderr)
    if on_cpu:
        # Otherwise its compiled CPU operators are built on first use: a minute, or a wait for ever
        # on the lock of a build that was killed.
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    return deepspeed


@contextmanager
def _local_rank_in_environment(world: World) -> Iterator[None]:
    """DeepSpeed asks the environment for the local rank, also without a launcher."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]
