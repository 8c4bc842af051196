"""DeepSpeed: import, process group, configuration, the engine around the student, safe loading.

DeepSpeed is imported only when needed: the import takes seconds.
"""

import collections
import contextlib
import hashlib
import importlib.util
import logging
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    """Import DeepSpeed, configured for this machine's accelerator."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with output_to_stderr():
        import deepspeed
        import deepspeed.ops
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:  # DeepSpeed's own, bound to standard output
            handler.setStream(sys.stderr)
    if on_cpu:
        # Otherwise the CPU operators are compiled on first use: a minute, or a deadlock on the lock
        # of a build that was killed.
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    return deepspeed


def join_group(world: World) -> None:
    """Let DeepSpeed use the existing process group; idempotent."""
    deepspeed = import_deepspeed()
    with local_rank_in_environment(world), output_to_stderr():
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
        )


def leave_group() -> None:
    """Destroy the process group and undo DeepSpeed's changes to this process."""
    deepspeed = import_deepspeed()
    # ZeRO 3 leaves its own `linear` in place, which rounds differently and would affect whatever
    # runs in this process afterwards.
    nn.functional.linear = _LINEAR
    # DeepSpeed keeps handles to the group, which only its own destroy function releases.
    if deepspeed.comm.comm.cdb is not None:
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def why_no_nvme() -> str | None:
    """Why NVMe offload is unavailable on this machine; None if it is available."""
    if importlib.util.find_spec("ninja") is None:
        return "ninja, which builds DeepSpeed's async_io, is missing: pip install ninja"
    import_deepspeed()
    with output_to_stderr():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        possible = AsyncIOBuilder().is_compatible(verbose=False)
    if not possible:
        return (
            "DeepSpeed's async_io cannot be built: it needs a C++ compiler and libaio with its "
            "headers (apt install g++ libaio-dev)"
        )
    return None


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Redirect DeepSpeed's output to stderr, since stdout is for results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        yield


@contextmanager
def local_rank_in_environment(world: World) -> Iterator[None]:
    """Set LOCAL_RANK, which DeepSpeed requires even without a launcher."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]


def check_engine_settings(config: TrainConfig) -> None:
    """Reject unsupported combinations of settings, before anything is loaded.

    Raises:
        ValueError: names the fields and values that work.
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
            "train.deepspeed.offload_parameters needs zero_stage 3, the only one that shards the "
            f"weights, got {deepspeed.zero_stage}"
        )
    if deepspeed.uses_nvme:
        _check_nvme(config)


def _check_nvme(config: TrainConfig) -> None:
    deepspeed = config.deepspeed
    if deepspeed.zero_stage < 3:
        raise ValueError(
            "train.deepspeed.offload_optimizer nvme needs zero_stage 3, since DeepSpeed keeps the "
            "states in host memory at lower stages, got "
            f"{deepspeed.zero_stage}; set it to cpu"
        )
    if config.optimizer.name == "adamw8bit" and deepspeed.offload_optimizer == "nvme":
        raise ValueError(
            "train.optimizer.name adamw8bit cannot be offloaded to nvme, whose files only hold "
            "float32 moments; set train.deepspeed.offload_optimizer to cpu, or the optimizer to "
            "adamw"
        )
    folder = deepspeed.nvme_path
    if folder is None:
        raise ValueError(
            "train.deepspeed.nvme_path must name a folder on a fast local disk for the nvme "
            "offload, got null"
        )
    if not folder.is_dir():
        raise ValueError(f"train.deepspeed.nvme_path {folder} is not a folder on this machine")
    if (reason := why_no_nvme()) is not None:
        raise ValueError(f"train.deepspeed offloads to nvme, but {reason}; or set it to cpu")


def describe_batch(config: TrainConfig, world_size: int) -> str:
    """Log line: a step's clips by process and forward pass, and the learning rate."""
    passes = accumulation_steps(config.batch_size, config.micro_batch_size, world_size)
    clips, processes = config.micro_batch_size, world_size
    return (
        f"batch {config.batch_size} = {clips} {_plural('clip', clips)} x "
        f"{processes} {_plural('process', processes)} x {passes} {_plural('pass', passes)}; "
        f"learning rate {config.optimizer.learning_rate:g} whatever the number of processes"
    )


def _plural(noun: str, number: int) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return noun if number == 1 else plural


def weights_dtype(config: DeepSpeedConfig) -> torch.dtype:
    """Dtype of the weights in the forward and backward pass."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


@contextmanager
def deepspeed_engine(
    student: Student, config: TrainConfig, world: World, *, universal: bool = False
) -> Iterator[Any]:
    """Context manager of a DeepSpeed engine; on exit, the process group is destroyed too.

    Within the context stdout is redirected to stderr, since DeepSpeed prints at any time.

    Args:
        universal: load checkpoints in the universal format, which fits any number of processes.
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
    in_float32 = _frozen_in_float32(student, weights_dtype(config.deepspeed))
    with local_rank_in_environment(world), output_to_stderr():
        try:
            join_group(world)
            engine, *_ = deepspeed.initialize(
                model=student,
                model_parameters=parameters,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=settings,
            )
            for parameter, value in in_float32:
                parameter.data = value.to(parameter.device)
            try:
                yield engine
            finally:
                engine.destroy()
        finally:
            leave_group()
            _remove_swap_files(config, world)


def _frozen_in_float32(student: Student, dtype: torch.dtype) -> list[tuple[nn.Parameter, Tensor]]:
    """Frozen weights that the model keeps in float32, such as Wan's time embedding.

    The engine casts all weights to its precision; these are put back afterwards. Not with ZeRO 3,
    which holds every weight in the engine's precision.

    Args:
        student: the student as it was loaded.
        dtype: the engine's precision.
    """
    if dtype == torch.float32:
        return []
    return [
        (parameter, parameter.detach().clone())
        for parameter in student.transformer.parameters()
        if not parameter.requires_grad
        and parameter.dtype == torch.float32
        and not hasattr(parameter, "ds_id")
    ]


def describe_rounding(student: Student, config: TrainConfig) -> str | None:
    """Log line on weights that are rounded though the model keeps them in float32; or None."""
    names = getattr(student.transformer, "_keep_in_fp32_modules", None)
    all_cast = config.method == "full" or config.deepspeed.zero_stage == 3
    if not names or not all_cast or weights_dtype(config.deepspeed) == torch.float32:
        return None
    return (
        f"warning: {', '.join(names)} run in bf16, which diffusers keeps in float32; they stay so "
        "with train.method=lora and zero_stage 2 or less, or with train.deepspeed.precision=fp32"
    )


def largest_parameter(module: nn.Module) -> int:
    """Number of elements of the largest parameter, counting sharded ones whole."""
    return max(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def deepspeed_settings(
    config: TrainConfig, world_size: int, *, largest: int = 0, universal: bool = False
) -> dict[str, Any]:
    """Build DeepSpeed's configuration.

    Args:
        largest: elements of the largest parameter, the size of NVMe offload buffers.
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
    for name, device in (
        ("offload_optimizer", deepspeed.offload_optimizer),
        ("offload_param", deepspeed.offload_parameters),
    ):
        if device != "none":
            zero[name] = {"device": device}
        if device == "nvme":
            zero[name]["nvme_path"] = str(_nvme_folder(config))
    if deepspeed.offload_parameters == "nvme":
        # The default, five buffers of 1e8 elements, takes gigabytes of page-locked memory.
        zero["offload_param"]["buffer_size"] = largest
    return zero


def _nvme_folder(config: TrainConfig) -> Path:
    """A folder per run, since DeepSpeed names files only by rank and deletes them at start."""
    assert config.deepspeed.nvme_path is not None, "checked by check_engine_settings"
    run = hashlib.sha256(str(config.run_dir.absolute()).encode()).hexdigest()[:12]
    return config.deepspeed.nvme_path / f"sam2vx-{run}"


def _remove_swap_files(config: TrainConfig, world: World) -> None:
    """Delete this rank's offloaded files; checkpoints do not need them."""
    if config.deepspeed.uses_nvme:
        for folder in _nvme_folder(config).glob(f"*/*/rank{world.rank}"):
            shutil.rmtree(folder, ignore_errors=True)


def gradient_norm_before_step(engine: Any) -> float | None:
    """Gradient norm under ZeRO 0, where DeepSpeed does not report it; None at other stages."""
    if engine.zero_optimization_stage() != 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


@contextmanager
def gathered_parameters(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context manager that gathers whole parameters on every rank, at any ZeRO stage."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    with (
        output_to_stderr(),
        import_deepspeed().zero.GatheredParameters(partitioned, modifier_rank=None),
    ):
        yield


_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables that torch.load reads on every call."""


@contextmanager
def deepspeed_loads_weights_only() -> Iterator[None]:
    """Context manager: torch.load reads only tensors, plain values and three DeepSpeed classes.

    Checkpoint files are pickles, which can name any function to be called on load.
    DeepSpeed calls torch.load with `weights_only=False`; torch's environment variable overrides
    that. The classes are those found in DeepSpeed's checkpoints.

    Raises:
        ValueError: a file names anything else; none of its code was executed.
    """
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [LossScaler, ZeroStageEnum, fragment_address]
    before = {name: os.environ.pop(name, None) for name in (_WEIGHTS_ONLY, _NO_WEIGHTS_ONLY)}
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with refuse_unsafe_pickles(), torch.serialization.safe_globals(classes):
            yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def refuse_unsafe_pickles() -> Iterator[None]:
    """Context manager: explain why `weights_only` refuses a file (`ValueError`)."""
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own message mostly advises how to load the file anyway.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named.group(1)}" if named else f"is not a checkpoint ({error})"
        raise ValueError(
            f"a file of the checkpoint {what}, unlike any file that this software writes: it could "
            "execute code, and was not loaded. Use another checkpoint, from a source you trust"
        ) from error
