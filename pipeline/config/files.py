"""Presets and configuration files, merged with the ones they extend.

A file holds what differs; `extends: preset-or-path` names the base that holds the rest.
"""

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.config.schema import ConfigError
from stages.files.text import read_text
from stages.files.yaml import MAX_FILE_BYTES, YamlError, parse_yaml

EXTENDS = "extends"
"""The key that names the base file; not a setting, removed from the tree."""

_PRESETS = resources.files("pipeline") / "presets"


def preset_names() -> list[str]:
    """Return the names of the presets in the package, sorted."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _PRESETS.iterdir() if p.name[-5:] == ".yaml"
    )


def read_config(preset_or_path: str) -> dict[str, Any]:
    """Read a preset or file, merged over the one it extends, recursively.

    Sections are merged key by key; all other values, including lists, replace those of the base. A
    relative path after `extends` is resolved from the folder of the file that names it.

    Raises:
        ConfigError: no such preset or file, not a YAML mapping of settings, or files that extend
            each other in a circle.
    """
    trees: list[dict[str, Any]] = []
    sources: list[str] = []
    name: str | None = preset_or_path
    folder = Path()
    while name is not None:
        text, source, folder = _load_text(name, folder, sources)
        if source in sources:
            circle = " extends ".join([*sources[sources.index(source) :], source])
            raise ConfigError(f"{circle}, in a circle; remove extends from one of them")
        sources.append(source)
        tree = _parse(text, source)
        name = _pop_extends(tree, source)
        trees.append(tree)
    merged: dict[str, Any] = {}
    for tree in reversed(trees):
        merged = _merge(merged, tree)
    return merged


def _load_text(name: str, folder: Path, sources: list[str]) -> tuple[str, str, Path]:
    """Text of a configuration, its name in messages, and the folder its `extends` starts from."""
    if name in preset_names():
        return (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), name, Path()
    path = folder / Path(name).expanduser()
    if not path.is_file():
        origin = f"{sources[-1]} extends {name!r}, but there is " if sources else ""
        raise ConfigError(
            f"{origin}no preset and no file called {str(path)!r}{_suggestion(path)} "
            f"{', '.join(preset_names())}"
        )
    try:
        return read_text(path, MAX_FILE_BYTES), str(path.resolve()), path.parent
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _suggestion(path: Path) -> str:
    """End of the error message: the most similar preset or file in the same folder, if any."""
    known = {_normalized(preset): preset for preset in preset_names()}
    files = [*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")]
    known |= {_normalized(file.name): str(file) for file in files}
    wanted = _normalized(path.name)
    similar = difflib.get_close_matches(wanted, known, n=1, cutoff=0.75)
    ends = [name for name in known if wanted and name.endswith(wanted)]
    best = similar or (ends if len(ends) == 1 else [])
    return f"; did you mean {known[best[0]]}? The presets are" if best else "; presets are"


def _normalized(name: str) -> str:
    """A name in lower case, without its suffix and separators."""
    return re.sub(r"[-_. ]", "", re.sub(r"\.ya?ml$", "", name.lower()))


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source} holds no settings; for an example, run sam2vx-pipeline config show --config "
            "demo"
        )
    return tree


def _pop_extends(tree: dict[str, Any], source: str) -> str | None:
    """Remove `extends` from the tree and return its value."""
    if EXTENDS not in tree:
        return None
    name = tree.pop(EXTENDS)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{source}: {EXTENDS} must be a preset or the path of a file, got {name!r}; presets "
            f"are {', '.join(preset_names())}"
        )
    return name


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        base_value = merged.get(key)
        if isinstance(base_value, Mapping) and isinstance(value, Mapping):
            value = _merge(base_value, value)
        merged[key] = value
    return merged
