"""Building the student: its weights read, adapters and projector put on; `train.py` uses it."""

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig

from stages.base_facts import BaseFacts
from stages.local_gram_flow import time_weights
from stages.train_student.config import LoraSettings, TrainConfig
from stages.train_student.projector import Projector
from stages.train_student.student import Student


def load_transformer(folder: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """The base pipeline's transformer, its weights cast to `dtype`."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype
    )
    return transformer.train()


def add_lora(transformer: CogVideoXTransformer3DModel, settings: LoraSettings) -> None:
    """Freeze the transformer and add adapters, which start without effect.

    Raises:
        ValueError: no module matches `target_modules`.
    """
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.target_modules),
            init_lora_weights=True,
        )
    )


def build_student(
    config: TrainConfig,
    facts: BaseFacts,
    dtype: torch.dtype,
    *,
    num_frames: int,
    teacher_maps: int | None,
) -> Student:
    """Load and prepare everything that is trained.

    Args:
        teacher_maps: maps per clip in the teacher's store; None for no auxiliary loss.
    """
    torch.manual_seed(config.seed)
    transformer = load_transformer(facts.folder, dtype)
    if config.method == "lora":
        add_lora(transformer, config.lora)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if teacher_maps is None:
        return Student(transformer)
    projector = Projector(
        facts.transformer["num_attention_heads"] * facts.transformer["attention_head_dim"],
        config.lgf.projector_widths,
        time_weights(teacher_maps, num_frames, patch_size_t=facts.patch_size_t),
    )
    return Student(transformer, projector.to(dtype), config.block)
