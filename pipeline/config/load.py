"""The configuration of a run: a preset or YAML file plus dotted overrides, validated.

Defaults are defined in the section classes only; a preset holds what differs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.config.files import EXTENDS, preset_names, read_config
from pipeline.config.schema import (
    ConfigError,
    explain,
    settings_of,
    unknown_key,
    with_help,
)
from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig, Section
from stages.demo.build import DemoConfig
from stages.evaluate.config import EvaluateConfig
from stages.extract_features.config import ExtractConfig
from stages.files.yaml import YamlError, parse_yaml
from stages.probe_blocks.config import ProbeConfig
from stages.sample_videos.config import SampleConfig
from stages.train_student.config import TrainConfig

__all__ = ["SETTINGS", "ConfigError", "RunConfig", "load_config", "preset_names"]


class RunConfig(Section):
    """The whole configuration; each stage receives the sections it reads."""

    name: str = Field(min_length=1)
    """Name of this configuration in summaries; presets use their own name."""
    cache: str = Field(default="cache", min_length=1)
    """Folder of the stores that stage one writes and other commands read; commands that only read
    also accept a URL, such as s3://bucket/cache."""
    outputs: Path = Path("outputs")
    """Folder for sampled videos and the images of inspect."""
    data: ClipsConfig
    """The dataset, and the size, length and frame rate of its clips."""
    model: BaseModelConfig
    """The pipeline to fine-tune, of CogVideoX or Wan."""
    extract: ExtractConfig = ExtractConfig()
    """Stage one: what is computed from the clips."""
    train: TrainConfig = TrainConfig()
    """Stage two: training."""
    sample: SampleConfig = SampleConfig()
    """Sampling videos."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Scores of generated videos."""
    probe: ProbeConfig = ProbeConfig()
    """Agreement of each block with the teacher, before training."""
    demo: DemoConfig | None = None
    """The built-in demo, generated if missing; null for your own data and models."""

    @property
    def cache_root(self) -> Path | str:
        """Folder or URL that stores are read from."""
        return self.cache if "://" in self.cache else Path(self.cache)

    @property
    def cache_folder(self) -> Path:
        """Folder that stores are written to.

        Raises:
            ConfigError: `cache` is a URL.
        """
        if "://" in self.cache:
            raise ConfigError(
                f"cache={self.cache} is a URL, but stores can only be written to a local folder; "
                "set cache to a folder, then upload it with sam2vx-pipeline cache copy"
            )
        return Path(self.cache)


SETTINGS = {setting.path: setting for setting in settings_of(RunConfig)}
"""Every setting by its dotted path."""


NEEDED = ("data.path", "model.path")
"""Settings without a default."""

NOT_GIVEN = "(not given)"
"""Placeholder for a required setting that the command does not read."""

_PATTERN_SETTING = "data.path"


def load_config(
    preset_or_path: str | None,
    overrides: Sequence[str] = (),
    *,
    needed: Sequence[str] = NEEDED,
) -> RunConfig:
    """Read a configuration, apply `key.key=value` overrides in order, add defaults and validate.

    A file may extend another (`pipeline.config.files`). Override values are YAML (`true`, `1e-4`,
    `null`, `[a, b]`). `${key.key}` in a string is replaced by the value of that setting after the
    overrides. A leading `~/` is expanded to the home folder.

    Args:
        preset_or_path: None uses the overrides only.
        overrides: as `key.key=value`.
        needed: those of `NEEDED` that the command reads; without a preset or file the others may
            be missing.

    Raises:
        ConfigError: no such preset or file, or none although one is needed; not YAML, or a
            duplicate key in a file; files that extend each other; two data.path; an unknown key,
            with the closest known one; a value out of range, with the range and the field's help.
    """
    tree = _empty_tree(needed) if preset_or_path is None else read_config(preset_or_path)
    _reject_expanded_pattern(overrides)
    for override in overrides:
        _apply(tree, override)
    tree = _resolve(tree, tree, "")
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        if preset_or_path is None:
            _raise_if_only_required_missing(error)
        raise ConfigError("\n".join(explain(error, SETTINGS))) from error
    _reject_bool_for_number(tree, config, "")
    return config


def _reject_expanded_pattern(overrides: Sequence[str]) -> None:
    """A shell expands data.path=clips/{00000..00003}.tar to four settings; the last would win."""
    given = [override for override in overrides if override.startswith(f"{_PATTERN_SETTING}=")]
    if len(set(given)) > 1:
        raise ConfigError(
            f"{given[0]} and {given[-1]} are both given; put a pattern such as {{00000..00003}} in "
            "quotes, so that the shell does not expand it"
        )


def _empty_tree(needed: Sequence[str]) -> dict[str, Any]:
    """The base tree when there is no preset or file."""
    tree: dict[str, Any] = {"name": "settings"}
    for key in NEEDED:
        section, _, leaf = key.partition(".")
        tree[section] = {} if key in needed else {leaf: NOT_GIVEN}
    return tree


def _raise_if_only_required_missing(error: ValidationError) -> None:
    """Raise a hint at --config if settings without a default are all that is missing."""
    absent = {".".join(map(str, problem["loc"])) for problem in error.errors()}
    missing = [key for key in NEEDED if key in absent]
    if missing and all(problem["type"] == "missing" for problem in error.errors()):
        raise ConfigError(
            "no configuration given; name a preset or a file with --config, such as --config "
            f"cogvideox-5b-lora or --config mine.yaml (--config demo is the built-in demo), or set "
            f"{' and '.join(f'{key}=…' for key in missing)}"
        ) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in `tree`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} is not key=value; overrides look like train.steps=20")
    if path == EXTENDS:
        raise ConfigError(f"{EXTENDS} is only allowed in a file; use --config {text}")
    if _NOT_UTF_8.search(override):
        raise ConfigError(
            f"{path}: {text!r} is not UTF-8 and could not be recorded with the outputs; rename the "
            "file or folder, or link to it under another name"
        )
    *parents, leaf = path.split(".")
    setting = SETTINGS.get(path)
    try:
        # YAML would parse *.tar as an alias, and {00000..00003}.tar as a mapping.
        is_pattern = path == _PATTERN_SETTING and text[:1] in ("*", "{", "[")
        value = text if is_pattern else parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: cannot read the value {text!r} ({error})") from error
    parent_setting = SETTINGS.get(".".join(parents))
    if setting is None and not (parent_setting and parent_setting.is_mapping):
        raise ConfigError(unknown_key(path, SETTINGS))
    if setting and setting.section and not (value is None and setting.is_optional):
        first = next(iter(setting.section.model_fields))
        raise ConfigError(f"{path} is a section; set one of its keys, such as {path}.{first}=…")
    node = tree
    for parent in parents:
        inner = node.get(parent)
        node[parent] = node = dict(inner) if isinstance(inner, Mapping) else {}
    node[leaf] = value


_NOT_UTF_8 = re.compile("[\udc80-\udcff]")
"""Surrogates that Python decodes the non-UTF-8 bytes of an argument to."""

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


def _resolve(value: Any, tree: Mapping[str, Any], path: str) -> Any:
    """Resolve references and `~/` in all strings, make keys strings, reject infinite numbers."""
    if isinstance(value, Mapping):
        return {
            str(k): _resolve(v, tree, f"{path}.{k}".removeprefix(".")) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_resolve(v, tree, path) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(with_help(f"{path} must be finite, got {value}", path, SETTINGS))
    if isinstance(value, str):
        value = _REFERENCE.sub(lambda found: _resolve_reference(found[1], tree, path), value)
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    return value


def _resolve_reference(target: str, tree: Mapping[str, Any], path: str) -> str:
    setting = SETTINGS.get(target)
    if setting is None:
        raise ConfigError(f"{path} refers to ${{{target}}}: {unknown_key(target, SETTINGS)}")
    value: Any = tree
    for part in target.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        value = setting.field.default
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{path} refers to ${{{target}}}, which is a reference itself; name its target instead"
        )
    if not isinstance(value, str | int | float | Path):
        raise ConfigError(f"{path} refers to ${{{target}}}, which is not a single value")
    return str(value)


def _reject_bool_for_number(raw: Any, checked: Any, path: str) -> None:
    """Reject booleans for numbers; pydantic would accept `steps: true` as 1."""
    if isinstance(raw, Mapping) and not isinstance(checked, Mapping):
        for key, value in raw.items():
            _reject_bool_for_number(value, getattr(checked, key), f"{path}.{key}" if path else key)
    elif isinstance(raw, list):
        for raw_item, checked_item in zip(raw, checked, strict=True):
            _reject_bool_for_number(raw_item, checked_item, path)
    elif isinstance(raw, bool) and not isinstance(checked, bool):
        text = f"{path} must be a number, got {str(raw).lower()}"
        raise ConfigError(with_help(text, path, SETTINGS))
