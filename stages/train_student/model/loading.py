"""Building the student: base weights, adapters, heads.

For ZeRO 3 the model is created without storage; rank 0 reads one parameter at a time, broadcasts
it, and each rank keeps its partition. No rank ever holds more than its partition and one parameter.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn

from stages.cogvideox.configs import BaseFacts
from stages.files.weight_checks import StoredTensor, check_weights, load_model
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
    quiet,
)
from stages.train_student.parallel.process_group import World, on_first_rank


def load_sharded_transformer(
    folder: Path, config: TrainConfig, dtype: torch.dtype, world: World
) -> CogVideoXTransformer3DModel:
    """The base pipeline's transformer under ZeRO 3, its weights cast to `dtype` and shared out.

    The process group must be there; every rank must call this alike.

    Args:
        folder: of the pipeline.

    Raises:
        ValueError: the file's tensors are not the model's; on other ranks a RuntimeError.
    """
    with init_empty_weights():
        transformer = CogVideoXTransformer3DModel.from_config(
            CogVideoXTransformer3DModel.load_config(folder, subfolder="transformer")
        )
    tensors = on_first_rank(
        world, lambda: check_weights(CogVideoXTransformer3DModel, folder / "transformer")
    )
    try:
        join_group(world)
        with local_rank_in_environment(world), quiet():
            _share_out(transformer, tensors, config, dtype, world)
    except BaseException:
        leave_group()
        raise
    return transformer.train()


def _share_out(
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
        # Sends rank 0's values to all, and leaves each its share of them.
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
    """The tensor on rank 0; elsewhere room for it."""
    if not world.is_first:
        return torch.empty(stored.shape, dtype=dtype, device=world.device)
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name).to(world.device, dtype)


def build_student(
    config: TrainConfig,
    facts: BaseFacts,
    dtype: torch.dtype,
    *,
    heads: Callable[[], nn.ModuleDict | None],
    world: World,
    zero_init: bool = True,
) -> Student:
    """Load and prepare everything that is trained.

    Under ZeRO 3 the transformer's weights go straight to the ranks' shards, and the process group
    must be there already; adapters and heads are small, and become shards with the engine. The
    weights are the same either way, and on every rank.

    Args:
        heads: makes the objectives' heads, or None, once the random numbers are seeded.
        zero_init: under ZeRO 3, whether to share out weights as they are read; without it every
            rank reads them all first.
    """
    sharded = zero_init and config.deepspeed.zero_stage == 3
    if sharded:
        transformer = load_sharded_transformer(facts.folder, config, dtype, world)
    else:
        transformer = load_transformer(facts.folder, dtype)
    torch.manual_seed(config.seed)
    if config.method == "lora":
        add_adapters(transformer, config.lora)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    made = heads()
    if made is None or not len(made):
        student = Student(transformer)
    else:
        student = Student(transformer, made.to(dtype), config.block)
    # Where some weights are shards already, the engine leaves the rest where it is.
    return student.to(world.device) if sharded else student


def load_transformer(folder: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """The base pipeline's transformer, its weights cast to `dtype`."""
    transformer = load_model(CogVideoXTransformer3DModel, folder / "transformer", torch_dtype=dtype)
    return transformer.train()
