"""Configurations of the official CogVideoX models, bundled so that they need no download."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.cogvideox.configs import (
    BASE_CONFIGS,
    TEXT_ENCODER_CONFIG,
    CogVideoXConfigs,
    read_configs,
    resolve_base_model,
)
from stages.config import BaseModelConfig
from stages.files.weight_checks import read_config

FOLDER = Path(__file__).parent
NAMES = (
    "cogvideox-2b",
    "cogvideox-5b",
    "cogvideox-5b-i2v",
    "cogvideox1.5-5b",
    "cogvideox1.5-5b-i2v",
)
"""Folders in this package: the hub's names in lower case."""
_OWNERS = ("zai-org", "thudm")
"""Owners on the hub; the second is the old name, which the hub still redirects."""


def official_configs(name: str) -> CogVideoXConfigs:
    """Bundled configurations of one of `NAMES`."""
    configs = read_configs(FOLDER / name)
    return replace(configs, text_encoder=read_config(FOLDER / TEXT_ENCODER_CONFIG))


def configs_for_estimate(
    model: BaseModelConfig, *, text_encoder: bool = False
) -> tuple[CogVideoXConfigs, tuple[str, ...]]:
    """Configurations of a base model, without a download if it is an official one.

    Args:
        model: The base model.
        text_encoder: Include the text encoder's configuration.

    Returns:
        The configurations, and notes for the user on where an official model's values came from.

    Raises:
        ValueError: As `resolve_base_model` and `read_configs`.
    """
    parts = (*BASE_CONFIGS, *([TEXT_ENCODER_CONFIG] if text_encoder else []))
    name = _official_name(model)
    if name is None:
        return read_configs(resolve_base_model(model, parts)), ()
    official = official_configs(name)
    try:
        folder = resolve_base_model(model, parts, download=False)
    except ValueError:
        note = f"{model.path} is not on this machine yet; a copy of its configuration is used"
        return official, (note,)
    configs = read_configs(folder)
    return configs, tuple(_differences(configs, official))


def _official_name(model: BaseModelConfig) -> str | None:
    """Name in `NAMES` of an official hub model without a pinned revision; None for others."""
    owner, _, name = model.path.lower().partition("/")
    if model.is_local or model.revision is not None or owner not in _OWNERS or name not in NAMES:
        return None
    return name


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differences(configs: CogVideoXConfigs, official: CogVideoXConfigs) -> Iterator[str]:
    sections: dict[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]] = {
        "transformer": (configs.transformer, official.transformer),
        "vae": (configs.vae, official.vae),
        "scheduler": (configs.scheduler, official.scheduler),
        "text_encoder": (configs.text_encoder, official.text_encoder),
    }
    for section, (found, bundled) in sections.items():
        if found is None or bundled is None:
            continue
        differing = [
            f"{key} = {found.get(key)!r} instead of {value!r}"
            for key, value in bundled.items()
            if not key.startswith("_") and key in found and _as_json(found[key]) != value
        ]
        if differing:
            yield (
                f"the {section} in {configs.folder} has {', '.join(differing)} in the bundled "
                "official configuration; using the model's own values"
            )
