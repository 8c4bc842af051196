"""A transformer whose weights go from the file straight into the ranks' shards; loading uses it.

For ZeRO 3: the model is made without storage, then rank 0 reads one parameter at a time, hands it
to every rank, and each keeps its share. No rank ever holds more than its shards and one parameter.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn

from stages.train_student.config import TrainConfig
from stages.train_student.deepspeed_library import (
    import_deepspeed,
    join_group,
    leave_group,
    local_rank_in_environment,
    quiet,
)
from stages.train_student.distributed import World, on_first_rank
from stages.train_student.engine import deepspeed_settings, largest_parameter
from stages.weight_checks import StoredTensor, check_weights


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
