"""Low-rank adapters: which modules get them, putting them on, what is written beside them.

`loading` puts them on the transformer, `train` checks their targets before anything is loaded, and
`export` writes their settings with them.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from torch import nn

from stages.train_student.config import LoraSettings

ADAPTER = "default"
"""Name of the adapter within the student's parameters; no export holds it."""


def lora_config(settings: LoraSettings) -> LoraConfig:
    """The settings in peft's words."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        use_dora=settings.dora,
        use_rslora=settings.rank_stabilized,
        init_lora_weights=True,
    )


def check_targets(settings: LoraSettings, transformer: Mapping[str, Any]) -> None:
    """Refuse targets that the transformer of these settings does not have; loads no weights.

    Args:
        settings: of the adapters.
        transformer: the base transformer's configuration.

    Raises:
        ValueError: a name that fits no module, or one that is no linear layer.
    """
    with torch.device("meta"):
        empty = CogVideoXTransformer3DModel.from_config(dict(transformer))
    _refuse_wrong_targets(settings, empty)


def add_adapters(transformer: CogVideoXTransformer3DModel, settings: LoraSettings) -> None:
    """Freeze the transformer and add adapters, which start without effect.

    The transformer's own weights may be partitioned already (ZeRO 3); the adapters are made whole
    on every rank, so call this outside `deepspeed.zero.Init`.

    Raises:
        ValueError: a target that is not there, or is no linear layer.
    """
    _refuse_wrong_targets(settings, transformer)
    transformer.requires_grad_(False)
    with _partitioned_weights_are_gathered(transformer):
        transformer.add_adapter(lora_config(settings), adapter_name=ADAPTER)


def exported_name(parameter: str) -> str:
    """The name that peft and diffusers give an adapter's parameter in a file.

    Args:
        parameter: its name in the transformer, such as `….to_q.lora_A.default.weight`.
    """
    # peft keeps DoRA's magnitudes in a module of their own, but writes them as plain tensors.
    name = parameter.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return name.replace(f".{ADAPTER}.", ".")


def _refuse_wrong_targets(settings: LoraSettings, transformer: nn.Module) -> None:
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
                f"{type(modules[other]).__name__} and no linear layer; write more of the path, or "
                "to_q, to_k, to_v, to_out.0, which are usual"
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
def _partitioned_weights_are_gathered(transformer: nn.Module) -> Iterator[None]:
    """Let peft see whole weights where it needs them (DoRA's magnitudes), one at a time."""
    if not any(hasattr(parameter, "ds_id") for parameter in transformer.parameters()):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # peft gathers weights while an object of this kind says that ZeRO 3 is on.
    says_so = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        yield
    finally:
        del says_so
