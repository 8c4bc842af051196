"""Building the student: its weights read, adapters and heads put on; `train.py` uses it."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from stages.base_facts import BaseFacts
from stages.train_student.config import TrainConfig
from stages.train_student.distributed import World
from stages.train_student.lora import add_adapters
from stages.train_student.sharded_loading import load_sharded_transformer
from stages.train_student.student import Student
from stages.weight_checks import load_model


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
