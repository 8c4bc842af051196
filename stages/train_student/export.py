"""Trained weights in the formats that diffusers loads; the training loop writes them at the end.

export/pytorch_lora_weights.safetensors   LoRA with its alpha: pipe.load_lora_weights(folder)
export/transformer/                       full tuning: from_pretrained(folder / "transformer")
"""

import shutil
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.train_student.distributed import World, barrier, on_first_rank
from stages.train_student.engine import gathered
from stages.train_student.student import Student

EXPORT_FOLDER = "export"


def export_weights(student: Student, run_dir: Path, world: World) -> Path:
    """Write the export and the projector; every rank must call this, rank 0 writes.

    The folder is replaced by one rename. With ZeRO 3 one parameter at a time is made whole.

    Returns:
        The export's folder.
    """
    folder = run_dir / EXPORT_FOLDER
    trained = _whole_state(student.transformer, world)
    projector = None if student.projector is None else _whole_state(student.projector, world)

    def write() -> None:
        partial = run_dir / f".{EXPORT_FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if hasattr(student.transformer, "peft_config"):
            _write_lora(student.transformer, trained, partial)
        else:
            _write_transformer(student.transformer, trained, partial / "transformer")
        if projector is not None:
            save_file(projector, run_dir / "projector.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    on_first_rank(world, write)
    barrier(world)
    return folder


def _whole_state(module: nn.Module, world: World) -> dict[str, Tensor]:
    """The module's saved state on the CPU of rank 0; of adapters alone, where there are some."""
    adapters_only = hasattr(module, "peft_config")
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if adapters_only and not parameter.requires_grad:
            continue
        with gathered([parameter]):
            if world.is_first:
                state[name] = parameter.detach().cpu().clone()
    if world.is_first and not adapters_only:
        parameters = dict(module.named_parameters())
        for name, value in module.state_dict().items():
            if name not in parameters:
                state[name] = value.detach().cpu().clone()
    return state


def _write_lora(
    transformer: CogVideoXTransformer3DModel, state: dict[str, Tensor], folder: Path
) -> None:
    CogVideoXPipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=state),
        # Without it a loader takes alpha = rank, and the adapters act with the wrong strength.
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def _write_transformer(
    transformer: CogVideoXTransformer3DModel, state: dict[str, Tensor], folder: Path
) -> None:
    with torch.device("meta"):
        empty = CogVideoXTransformer3DModel.from_config(transformer.config)
    empty.load_state_dict(state, assign=True)
    empty.save_pretrained(str(folder))
