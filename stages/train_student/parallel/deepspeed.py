"""DeepSpeed: its import, process group, configuration, and the engine around the student.

The only file that imports DeepSpeed, and only when needed: the import takes seconds.
"""

import collections
import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.train_student.config import DeepSpeedConfig, TrainConfig
from stages.train_student.data.order import accumulation_steps
from stages.train_student.model.student import Student
from stages.train_student.parallel.optimizers import (
    build_optimizer,
    check_optimizer,
    learning_rate_factor,
)
from stages.train_student.parallel.process_group import World

_LINEAR = nn.functional.linear


def import_deepspeed() -> Any:
    """The module, ready for the machine at hand."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
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


def join_group(world: World) -> Any:
    """Let DeepSpeed use the process group that is there; return DeepSpeed. May be called again."""
    deepspeed = import_deepspeed()
    with local_rank_in_environment(world), quiet():
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
        )
    return deepspeed


def leave_group() -> None:
    """End the process group and what DeepSpeed changed in this process."""
    deepspeed = import_deepspeed()
    # ZeRO 3 leaves its own in place, which rounds differently: what runs in this process
    # afterwards must not.
    nn.functional.linear = _LINEAR
    # DeepSpeed keeps handles on the group: it must end the group itself to drop them.
    if deepspeed.comm.comm.cdb is not None:
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def why_no_nvme() -> str | None:
    """Why tensors cannot wait on a disk here, or None if they can."""
    if importlib.util.find_spec("ninja") is None:
        return "ninja, which builds DeepSpeed's async_io, is missing: pip install ninja"
    import_deepspeed()
    with quiet():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        possible = AsyncIOBuilder().is_compatible(verbose=False)
    if not possible:
        return (
            "DeepSpeed's async_io cannot be built: it needs a C++ compiler and libaio with its "
            "headers (apt install g++ libaio-dev)"
        )
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Send what DeepSpeed prints to the error stream: the standard output is for results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        yield


@contextmanager
def local_rank_in_environment(world: World) -> Iterator[None]:
    """DeepSpeed asks the environment for the local rank, also without a launcher."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]


def check_engine_settings(config: TrainConfig) -> None:
    """Refuse what no engine can do, before anything is loaded.

    Raises:
        ValueError: naming the fields and what would do.
    """
    check_optimizer(config.optimizer)
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
    if deepspeed.zero_stage < 3 and deepspeed.offload_parameters != "none":
        raise ValueError(
            "train.deepspeed.offload_parameters needs zero_stage 3, which alone shards the "
            f"weights, got {deepspeed.zero_stage}"
        )
    if "nvme" in (deepspeed.offload_optimizer, deepspeed.offload_parameters):
        _check_nvme(config)


def _check_nvme(config: TrainConfig) -> None:
    deepspeed = config.deepspeed
    if deepspeed.zero_stage < 3:
        raise ValueError(
            "train.deepspeed.offload_optimizer nvme needs zero_stage 3, since DeepSpeed keeps the "
            f"states in host memory at the others, got {deepspeed.zero_stage}; set it to cpu"
        )
    if config.optimizer.name == "adamw8bit" and deepspeed.offload_optimizer == "nvme":
        raise ValueError(
            "train.optimizer.name adamw8bit cannot wait on a disk, whose files hold float32 "
            "moments alone; set train.deepspeed.offload_optimizer to cpu, or the optimizer to adamw"
        )
    folder = deepspeed.nvme_path
    if folder is None:
        raise ValueError(
            "train.deepspeed.nvme_path must name a folder on a fast local disk for what is "
            "offloaded to nvme, got null"
        )
    if not folder.is_dir():
        raise ValueError(f"train.deepspeed.nvme_path {folder} is no folder on this machine")
    if (reason := why_no_nvme()) is not None:
        raise ValueError(f"train.deepspeed offloads to nvme, but {reason}; or set it to cpu")


def batch_told(config: TrainConfig, world_size: int) -> str:
    """How a step's clips are shared among the processes, and that the rate stays."""
    passes = accumulation_steps(config.batch_size, config.micro_batch_size, world_size)
    clips, processes = config.micro_batch_size, world_size
    return (
        f"batch {config.batch_size} = {clips} {_s('clip', clips)} x "
        f"{processes} {_s('process', processes)} x {passes} {_s('pass', passes)}; learning rate "
        f"{config.optimizer.learning_rate:g} whatever the number of processes"
    )


def _s(noun: str, number: int) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return noun if number == 1 else plural


def weights_dtype(config: DeepSpeedConfig) -> torch.dtype:
    """Format of the weights in the forward and backward pass."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


@contextmanager
def deepspeed_engine(
    student: Student, config: TrainConfig, world: World, *, universal: bool = False
) -> Iterator[Any]:
    """A DeepSpeed engine for the length of the block; the process group ends with it.

    Inside the block the standard output goes to the error stream, since DeepSpeed prints to it at
    any time.

    Args:
        universal: checkpoints that it loads are universal ones, which fit any number of processes.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    in_host_memory = world.device.type != "cpu" and config.deepspeed.offload_optimizer != "none"
    optimizer = build_optimizer(parameters, config.optimizer, in_host_memory=in_host_memory)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.optimizer, config.steps)
    )
    settings = deepspeed_settings(
        config, world.size, largest=largest_parameter(student), universal=universal
    )
    deepspeed = import_deepspeed()
    with local_rank_in_environment(world), quiet():
        try:
            join_group(world)
            engine, *_ = deepspeed.initialize(
                model=student,
                model_parameters=parameters,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=settings,
            )
            try:
                yield engine
            finally:
                engine.destroy()
        finally:
            leave_group()
            _drop_swapped(config, world)


def largest_parameter(module: nn.Module) -> int:
    """Values in the largest parameter, sharded ones counted whole."""
    return max(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def deepspeed_settings(
    config: TrainConfig, world_size: int, *, largest: int = 0, universal: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration, in its own words.

    Args:
        largest: values in the largest parameter, for the buffers between disk and device.
        universal: see `deepspeed_engine`.
    """
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(
            config.batch_size, config.micro_batch_size, world_size
        ),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": _zero_settings(config, largest),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": config.optimizer.name != "adamw",
        "steps_per_print": None,
    }
    if config.deepspeed.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    return settings


def _zero_settings(config: TrainConfig, largest: int) -> dict[str, Any]:
    deepspeed = config.deepspeed
    zero: dict[str, Any] = {"stage": deepspeed.zero_stage}
    for name, where in (
        ("offload_optimizer", deepspeed.offload_optimizer),
        ("offload_param", deepspeed.offload_parameters),
    ):
        if where != "none":
            zero[name] = {"device": where}
        if where == "nvme":
            zero[name]["nvme_path"] = str(_nvme_folder(config))
    if deepspeed.offload_parameters == "nvme":
        # Its default, five times 1e8 values, is gigabytes of locked host memory.
        zero["offload_param"]["buffer_size"] = largest
    return zero


def _nvme_folder(config: TrainConfig) -> Path:
    """The run's own: DeepSpeed names files by rank alone, and clears them when it starts."""
    assert config.deepspeed.nvme_path is not None, "check_engine_settings asks for it"
    run = hashlib.sha256(str(config.run_dir.absolute()).encode()).hexdigest()[:12]
    return config.deepspeed.nvme_path / f"sam2vx-{run}"


def _drop_swapped(config: TrainConfig, world: World) -> None:
    """Remove what this rank left on the disk; checkpoints hold all of it."""
    deepspeed = config.deepspeed
    if "nvme" in (deepspeed.offload_optimizer, deepspeed.offload_parameters):
        for folder in _nvme_folder(config).glob(f"*/*/rank{world.rank}"):
            shutil.rmtree(folder, ignore_errors=True)


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
    with quiet(), import_deepspeed().zero.GatheredParameters(partitioned, modifier_rank=None):
        yield
