"""LoRA adapters: peft configuration, target checks, insertion, exported parameter names."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from stages.students.student import StudentConfigs
from stages.train_student.config import LoraSettings

ADAPTER = "default"
"""Adapter name within the student's parameters; removed on export."""


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Convert the settings to peft's configuration."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        use_dora=settings.dora,
        use_rslora=settings.rank_stabilized,
        init_lora_weights=True,
    )


def check_targets(settings: LoraSettings, configs: StudentConfigs) -> None:
    """Reject targets that the transformer does not have, without loading weights.

    Args:
        settings: adapter settings.
        configs: configurations of the base model.

    Raises:
        ValueError: a target matches no module, or one that is not a linear layer.
    """
    with torch.device("meta"):
        empty = configs.model_class("transformer").from_config(dict(configs.transformer))
    _check_targets(settings, empty)


def add_adapters(transformer: Any, settings: LoraSettings) -> None:
    """Freeze the transformer and add adapters, initialised to have no effect.

    The transformer's weights may be partitioned already (ZeRO 3); adapters are created whole on
    every rank, so call this outside `deepspeed.zero.Init`.

    Raises:
        ValueError: a target matches no module, or one that is not a linear layer.
    """
    _check_targets(settings, transformer)
    transformer.requires_grad_(False)
    with _peft_gathers_weights(transformer):
        transformer.add_adapter(lora_config(settings), adapter_name=ADAPTER)


def exported_name(parameter: str) -> str:
    """Name of an adapter parameter in files of peft and diffusers.

    Args:
        parameter: its name in the transformer, such as `….to_q.lora_A.default.weight`.
    """
    # peft keeps DoRA's magnitudes in a module, but saves them as plain tensors.
    name = parameter.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".{ADAPTER}.", ".")


def _check_targets(settings: LoraSettings, transformer: nn.Module) -> None:
    modules = {name: module for name, module in transformer.named_modules() if name}
    for target in settings.target_modules:
        fitting = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not fitting:
            raise ValueError(
                f"train.lora.target_modules: the transformer has no module {target!r}"
                f"{_did_you_mean(target, modules)} to_q, to_k, to_v, to_out.0 are usual"
            )
        other = next((name for name in fitting if not isinstance(modules[name], nn.Linear)), None)
        if other is not None:
            raise ValueError(
                f"train.lora.target_modules: {target!r} also names {other}, which is a "
                f"{type(modules[other]).__name__}, not a linear layer; give a longer path; "
                "to_q, to_k, to_v, to_out.0 are usual"
            )


def _did_you_mean(target: str, modules: Mapping[str, nn.Module]) -> str:
    endings = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            parts = name.split(".")
            endings |= {".".join(parts[i:]) for i, part in enumerate(parts) if not part.isdigit()}
    near = difflib.get_close_matches(target, sorted(endings), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ";"


@contextmanager
def _peft_gathers_weights(transformer: nn.Module) -> Iterator[None]:
    """Make peft gather partitioned weights where it needs them (DoRA's magnitudes), one by one."""
    if not any(hasattr(parameter, "ds_id") for parameter in transformer.parameters()):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # peft gathers weights while such an object exists and reports ZeRO 3.
    zero3_marker = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        yield
    finally:
        del zero3_marker
