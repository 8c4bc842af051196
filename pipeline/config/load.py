"""The configuration of a run: a preset or YAML file, then dotted overrides, typed and checked.

Used by every command. Defaults live in the sections' classes alone; a preset holds what differs.
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
from stages.demo.config import DemoConfig
from stages.extract_features.config import ExtractConfig
from stages.files.yaml import YamlError, parse_yaml
from stages.sample_videos.config import SampleConfig
from stages.train_student.config import TrainConfig

__all__ = ["SETTINGS", "ConfigError", "RunConfig", "load_config", "preset_names"]


class RunConfig(Section):
    """Everything a command needs to know; each stage is handed the sections it reads."""

    name: str = Field(min_length=1)
    """What this configuration is called in summaries; a preset's own name is usual."""
    cache: str = Field(default="cache", min_length=1)
    """Folder of the stores that stage one writes and the other commands read; those that only read
    also take a URL, such as s3://bucket/cache."""
    outputs: Path = Path("outputs")
    """Folder of sampled videos and of inspect's pictures."""
    data: ClipsConfig
    """Which clips, and the size, length and rate they are brought to."""
    model: BaseModelConfig
    """The CogVideoX pipeline that is taught."""
    extract: ExtractConfig = ExtractConfig()
    """Stage one: what is computed from the clips."""
    train: TrainConfig = TrainConfig()
    """Stage two: what is trained."""
    sample: SampleConfig = SampleConfig()
    """How a video is drawn."""
    demo: DemoConfig | None = None
    """The built-in demo, made when it is missing; null works with your own files alone."""

    @property
    def cache_root(self) -> Path | str:
        """Where stores are read: a folder or a URL."""
        return self.cache if "://" in self.cache else Path(self.cache)

    @property
    def cache_folder(self) -> Path:
        """Where stores are written.

        Raises:
            ConfigError: `cache` is a URL.
        """
        if "://" in self.cache:
            raise ConfigError(
                f"cache={self.cache} is a URL, and stores are written to a local folder; set "
                "cache=folder, and take it there with sam2vx-pipeline cache copy"
            )
        return Path(self.cache)


SETTINGS = {setting.path: setting for setting in settings_of(RunConfig)}
"""Every key of the configuration by its dotted path."""


NEEDED = ("data.path", "model.path")
"""The settings without a default."""

NOT_GIVEN = "(not given)"
"""Stands in the place of a setting that the command does without."""

_TAKES_PATTERNS = "data.path"


def load_config(
    preset_or_path: str | None,
    overrides: Sequence[str] = (),
    *,
    needed: Sequence[str] = NEEDED,
) -> RunConfig:
    """Read a configuration, apply `key.key=value` overrides in order, fill in and check it.

    A file may extend another (`config_files`). Values of overrides are YAML (`true`, `1e-4`,
    `null`, `[a, b]`). `${key.key}` within a text stands for another setting's value, after the
    overrides. A leading `~/` is the home folder.

    Args:
        preset_or_path: None takes the overrides alone.
        overrides: as `key.key=value`.
        needed: those of `NEEDED` that the command reads; without a preset or file it does without
            the others.

    Raises:
        ConfigError: no such preset or file, or none where one is needed; not YAML, or a key twice
            in a file; files that extend each other; two data.path; an unknown key, with the closest
            known one; a value out of range, with the range and the field's help.
    """
    tree = _from_nothing(needed) if preset_or_path is None else read_config(preset_or_path)
    _refuse_expanded_pattern(overrides)
    for override in overrides:
        _apply(tree, override)
    tree = _resolve(tree, tree, "")
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        if preset_or_path is None:
            _ask_for_a_configuration(error)
        raise ConfigError("\n".join(explain(error, SETTINGS))) from error
    _refuse_true_for_one(tree, config, "")
    return config


def _refuse_expanded_pattern(overrides: Sequence[str]) -> None:
    """A shell makes four settings of data.path=clips/{00000..00003}.tar; the last would win."""
    given = [override for override in overrides if override.startswith(f"{_TAKES_PATTERNS}=")]
    if len(set(given)) > 1:
        raise ConfigError(
            f"{given[0]} and {given[-1]} are both given; a pattern such as {{00000..00003}} stands "
            "in quotes, or the shell expands it"
        )


def _from_nothing(needed: Sequence[str]) -> dict[str, Any]:
    """The tree that overrides alone are laid over."""
    tree: dict[str, Any] = {"name": "settings"}
    for key in NEEDED:
        section, _, leaf = key.partition(".")
        tree[section] = {} if key in needed else {leaf: NOT_GIVEN}
    return tree


def _ask_for_a_configuration(error: ValidationError) -> None:
    """Raise where nothing but settings without a default is missing."""
    missing = {".".join(map(str, problem["loc"])) for problem in error.errors()}
    lacking = [key for key in NEEDED if key in missing]
    if lacking and all(problem["type"] == "missing" for problem in error.errors()):
        raise ConfigError(
            "which configuration? Name a preset or a file with --config, such as --config "
            f"cogvideox-5b-lora or --config mine.yaml (--config demo is the built-in demo), or set "
            f"{' and '.join(f'{key}=…' for key in lacking)}"
        ) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in `tree`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} sets nothing; overrides look like train.steps=20")
    if path == EXTENDS:
        raise ConfigError(f"{EXTENDS} belongs into a file; give {text} itself as --config")
    if _NOT_UTF_8.search(override):
        raise ConfigError(
            f"{path}: {text!r} is not UTF-8, and could not be kept with what is made; rename the "
            "file or folder, or make a link to it under another name"
        )
    *parents, leaf = path.split(".")
    setting = SETTINGS.get(path)
    try:
        # To YAML *.tar is an alias, and {00000..00003}.tar a mapping.
        is_pattern = path == _TAKES_PATTERNS and text[:1] in ("*", "{", "[")
        value = text if is_pattern else parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: cannot read the value {text!r} ({error})") from error
    holder = SETTINGS.get(".".join(parents))
    if setting is None and not (holder and holder.is_mapping):
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
"""How Python reads the bytes of an argument that are not UTF-8."""

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


def _resolve(value: Any, tree: Mapping[str, Any], path: str) -> Any:
    """Replace references and `~/` in every text of `value`, make keys text; refuse infinities."""
    if isinstance(value, Mapping):
        return {
            str(k): _resolve(v, tree, f"{path}.{k}".removeprefix(".")) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_resolve(v, tree, path) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(with_help(f"{path} must be finite, got {value}", path, SETTINGS))
    if isinstance(value, str):
        value = _REFERENCE.sub(lambda found: _refer(found[1], tree, path), value)
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    return value


def _refer(target: str, tree: Mapping[str, Any], path: str) -> str:
    setting = SETTINGS.get(target)
    if setting is None:
        raise ConfigError(f"{path} refers to ${{{target}}}: {unknown_key(target, SETTINGS)}")
    value: Any = tree
    for part in target.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        value = setting.field.default
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path} refers to ${{{target}}}, which refers on; name the last one")
    if not isinstance(value, str | int | float | Path):
        raise ConfigError(f"{path} refers to ${{{target}}}, which holds no single value")
    return str(value)


def _refuse_true_for_one(raw: Any, checked: Any, path: str) -> None:
    """`steps: true` would pass as 1."""
    if isinstance(raw, Mapping) and not isinstance(checked, Mapping):
        for key, value in raw.items():
            _refuse_true_for_one(value, getattr(checked, key), f"{path}.{key}" if path else key)
    elif isinstance(raw, list):
        for one, taken in zip(raw, checked, strict=True):
            _refuse_true_for_one(one, taken, path)
    elif isinstance(raw, bool) and not isinstance(checked, bool):
        text = f"{path} must be a number, got {str(raw).lower()}"
        raise ConfigError(with_help(text, path, SETTINGS))
