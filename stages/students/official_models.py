"""Bundled configurations of the students' official models, so that estimates need no download."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from stages.config import BaseModelConfig, Expert
from stages.files.weight_checks import read_config
from stages.students.cogvideox import official_models as cogvideox
from stages.students.experts import resolve_configurations
from stages.students.registry import BASE_CONFIGS, TEXT_ENCODER_CONFIG, read_configs
from stages.students.student import StudentConfigs
from stages.students.wan import official_models as wan

_FAMILIES = (cogvideox, wan)
FOLDERS = {name: family.FOLDER / name for family in _FAMILIES for name in family.NAMES}
"""Folder of every bundled model, by the hub's name in lower case."""
_HUB_IDS = {
    f"{owner}/{name}": name
    for family in _FAMILIES
    for owner in family.OWNERS
    for name in family.NAMES
}


def official_configs(name: str, expert: Expert | None = None) -> StudentConfigs:
    """Bundled configurations of one of `FOLDERS`."""
    configs = read_configs(FOLDERS[name], expert)
    text_encoder = read_config(FOLDERS[name].parent / TEXT_ENCODER_CONFIG)
    return replace(configs, text_encoder=text_encoder)


def configs_for_estimate(
    model: BaseModelConfig, *, text_encoder: bool = False
) -> tuple[StudentConfigs, tuple[str, ...]]:
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
        return read_configs(resolve_configurations(model, parts), model.expert), ()
    official = official_configs(name, model.expert)
    try:
        folder = resolve_configurations(model, parts, download=False)
    except ValueError:
        note = f"{model.path} is not on this machine yet; a copy of its configuration is used"
        return official, (note,)
    configs = read_configs(folder, model.expert)
    return configs, tuple(_differences(configs, official))


def _official_name(model: BaseModelConfig) -> str | None:
    """Name in `FOLDERS` of an official hub model without a pinned revision; None for others."""
    if model.is_local or model.revision is not None:
        return None
    return _HUB_IDS.get(model.path.lower())


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differences(configs: StudentConfigs, official: StudentConfigs) -> Iterator[str]:
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
