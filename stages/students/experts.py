"""The transformer of a base model that training uses: its only one, or the one of two it names."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from stages.config import BaseModelConfig, Expert
from stages.students.hub import resolve_base_model
from stages.students.registry import has_two_transformers, read_configs
from stages.students.student import StudentConfigs, transformer_part

CONFIGURATIONS = ("transformer/config.json", "vae/config.json", "scheduler")
"""Base-model files that are read before any weights are loaded."""


def resolve_configurations(
    model: BaseModelConfig, files: Sequence[str], *, download: bool = True
) -> Path:
    """As `resolve_base_model`, with the configuration of the transformer that `model` names."""
    folder = resolve_base_model(model, files, download=download)
    if model.expert is None or not has_two_transformers(folder):
        return folder
    own = f"{transformer_part(model.expert)}/config.json"
    return resolve_base_model(model, (*files, own), download=download)


def trained_configs(model: BaseModelConfig) -> StudentConfigs:
    """Read the configurations of a base model, with those of the transformer that is trained.

    Raises:
        ValueError: As `resolve_base_model`, `read_configs` and `check_expert`.
    """
    folder = resolve_configurations(model, CONFIGURATIONS)
    configs = read_configs(folder, model.expert)
    check_expert(configs)
    return configs


def check_expert(configs: StudentConfigs) -> None:
    """Check that training knows which of two transformers it is to use (`ValueError`)."""
    if configs.boundary_ratio is not None and configs.expert is None:
        raise ValueError(
            f"{configs.folder / 'model_index.json'} has two transformers, one for much noise and "
            "one for little; a run trains one: set model.expert to "
            f"{' or '.join(get_args(Expert))}, and train the other in a second run"
        )
