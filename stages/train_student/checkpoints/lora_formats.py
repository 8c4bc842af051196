"""Key formats of exported LoRA adapters.

    diffusers  transformer.transformer_blocks.0.attn1.to_q.lora_B.weight
    comfyui    diffusion_model.blocks.0.q.lora_B.weight
    kohya      lora_unet__transformer_blocks_0_attn1_to_q.lora_up.weight, and ….alpha

These are CogVideoX's names; each student has its own for comfyui and kohya.

In all of them alpha equals the rank, and the scale is folded into lora_B, so that programs that
ignore alpha or rank-stabilized scaling apply the adapters at the strength they were trained with.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor

from stages.files.tensor_files import save_tensors, umask_modes
from stages.sample_videos.runs import LORA_FILES, LoraFormat
from stages.students.student import StudentConfigs

_KOHYA_FACTORS = {"A": "lora_down", "B": "lora_up"}
"""LoRA factors -> kohya's names."""


def lora_scale(settings: LoraConfig) -> float:
    """The factor by which peft multiplies lora_B @ lora_A."""
    rank = math.sqrt(settings.r) if settings.use_rslora else settings.r
    return float(settings.lora_alpha / rank)


def check_format(form: LoraFormat, *, dora: bool) -> None:
    """Check that the format can hold the adapters (`ValueError`)."""
    if dora and form != "diffusers":
        raise ValueError(
            f"the run trains DoRA (train.lora.dora), whose magnitudes can be exported for "
            f"diffusers alone; leave out --format {form}"
        )


def write_adapters(
    layers: Mapping[str, Tensor],
    settings: LoraConfig,
    student: type[StudentConfigs],
    folder: Path,
    form: LoraFormat,
) -> None:
    """Write adapters in a key format, with the scale folded into lora_B.

    Args:
        layers: adapter weights by peft's names within the transformer, such as
            `….to_q.lora_A.weight`.
        settings: settings of the trained adapters; without per-module ranks or alphas.
        student: the family of the transformer.
        folder: receives the file named by `LORA_FILES`.
        form: the key format.

    Raises:
        ValueError: DoRA in a format other than diffusers.
    """
    assert form in get_args(LoraFormat)
    assert not settings.rank_pattern and not settings.alpha_pattern
    check_format(form, dora=settings.use_dora)
    scale = lora_scale(settings)
    folded = {
        name: (value.float() * scale).to(value.dtype) if ".lora_B." in name else value
        for name, value in layers.items()
    }
    if form == "diffusers":
        with umask_modes(folder):
            pipeline = getattr(diffusers, next(iter(student.PIPELINES)))
            pipeline.save_lora_weights(
                str(folder),
                transformer_lora_layers=folded,
                transformer_lora_adapter_metadata=_metadata(settings),
            )
        return
    renamed = _renamed(folded, student, form, settings.r)
    save_tensors(renamed, folder / LORA_FILES[form], {"format": "pt"})


def _metadata(settings: LoraConfig) -> dict[str, Any]:
    """Adapter settings that all peft versions know; older versions reject unknown ones."""
    metadata: dict[str, Any] = {
        "r": settings.r,
        "lora_alpha": settings.r,
        "rank_pattern": {},
        "alpha_pattern": {},
        # Sorted, since the order of a set varies: equal weights should give identical files.
        "target_modules": sorted(settings.target_modules),
    }
    # Without use_dora, loaders that rely on the metadata ignore the magnitudes.
    return metadata | ({"use_dora": True} if settings.use_dora else {})


def _renamed(
    layers: Mapping[str, Tensor], student: type[StudentConfigs], form: LoraFormat, rank: int
) -> dict[str, Tensor]:
    renamed = {}
    for name, value in layers.items():
        module, factor = name.split(".lora_")
        layer = student.lora_layer_name(module, form)
        if form == "comfyui":
            renamed[f"{layer}.lora_{factor}"] = value
        else:
            renamed[f"{layer}.{_KOHYA_FACTORS[factor[0]]}.weight"] = value
            renamed[f"{layer}.alpha"] = torch.tensor(float(rank))
    return renamed
