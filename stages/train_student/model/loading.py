"""Construction of the student: base weights, adapters, heads.

For ZeRO 3 the model is created without storage; rank 0 reads one parameter at a time, broadcasts
it, and each rank keeps its partition. No rank holds more than its partition and one parameter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from stages.files.weight_checks import StoredTensor, check_weights, load_model
from stages.students.student import StudentConfigs
from stages.students.weights import Part, model_class_of
from stages.train_student.config import TrainConfig
from stages.train_student.model.lora import add_adapters
from stages.train_student.model.student import Student
from stages.train_student.parallel.deepspeed import (
    deepspeed_settings,
    import_deepspeed,
    join_group,
    largest_parameter,
    leave_group,
    local_rank_in_environment,
    output_to_stderr,
)
from stages.train_student.parallel.process_group import World, on_first_rank


def load_sharded_transformer(
    folder: Path,
    config: TrainConfig,
    dtype: torch.dtype,
    world: World,
    part: Part = "transformer",
) -> nn.Module:
    """Load the base transformer under ZeRO 3, cast to `dtype` and partitioned over the ranks.

    A collective call; the process group must be initialised.

    Args:
        folder: the base pipeline.
        part: the transformer's folder in it.

    Raises:
        ValueError: the stored tensors do not match the model; on other ranks a RuntimeError.
    """
    model_class = model_class_of(part, folder)
    with init_empty_weights():
        transformer: nn.Module = model_class.from_config(
            model_class.load_config(folder, subfolder=part)
        )
    tensors = on_first_rank(world, lambda: check_weights(model_class, folder / part))
    try:
        join_group(world)
        with local_rank_in_environment(world), output_to_stderr():
            _partition(transformer, tensors, config, dtype, world)
    except BaseException:
        leave_group()
        raise
    return transformer.train()


def _partition(
    transformer: nn.Module,
    stored: dict[str, StoredTensor],
    config: TrainConfig,
    dtype: torch.dtype,
    world: World,
) -> None:
    settings = deepspeed_settings(config, world.size, largest=largest_parameter(transformer))
    init = import_deepspeed().zero.Init(config_dict_or_path=settings)
    for name, empty in list(transformer.named_parameters()):
        value = _read(stored[name], dtype, world)
        parameter = nn.Parameter(value, requires_grad=empty.requires_grad)
        _place(transformer, name, parameter)
        del value
        # Broadcasts rank 0's values and leaves each rank its partition.
        init._convert_to_zero_parameters([parameter])
    for name, buffer in list(transformer.named_buffers()):
        whole = buffer.to(world.device)
        if name in stored:
            whole = _read(stored[name], dtype, world)
            if world.size > 1:
                dist.broadcast(whole, src=0)
        _place(transformer, name, whole)


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    prefix, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(prefix), leaf, tensor)


def _read(stored: StoredTensor, dtype: torch.dtype, world: World) -> Tensor:
    """The tensor on rank 0, an empty one of its shape on the other ranks."""
    if not world.is_first:
        return torch.empty(stored.shape, dtype=dtype, device=world.device)
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name).to(world.device, dtype)


def build_student(
    config: TrainConfig,
    configs: StudentConfigs,
    dtype: torch.dtype,
    *,
    heads: Callable[[], nn.ModuleDict | None],
    world: World,
    zero_init: bool = True,
) -> Student:
    """Load the transformer and add adapters and heads.

    Under ZeRO 3 the transformer's weights are partitioned as they are read, which needs an
    initialised process group; the engine partitions the small adapters and heads later. The weights
    are the same either way, and on every rank.

    Args:
        heads: builds the objectives' heads, or returns None; called after seeding.
        zero_init: under ZeRO 3, partition weights as they are read; otherwise every rank reads all
            of them first.
    """
    sharded = zero_init and config.deepspeed.zero_stage == 3
    transformer: Any
    if sharded:
        transformer = load_sharded_transformer(
            configs.folder, config, dtype, world, configs.transformer_part
        )
    else:
        transformer = load_transformer(configs.folder, dtype, configs.transformer_part)
    torch.manual_seed(config.seed)
    if config.method == "lora":
        add_adapters(transformer, config.lora)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    built = heads()
    if built is None or not len(built):
        student = Student(transformer)
    else:
        student = Student(transformer, built.to(dtype), config.block)
    # If some weights are partitioned already, the engine does not move the rest to the device.
    return student.to(world.device) if sharded else student


def load_transformer(folder: Path, dtype: torch.dtype, part: Part = "transformer") -> Any:
    """Load a transformer of the base pipeline, cast to `dtype`."""
    model_class = model_class_of(part, folder)
    return load_model(model_class, folder / part, torch_dtype=dtype).train()
