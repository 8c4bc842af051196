"""Presets and configuration files, read with what they extend into one tree of settings.

A file holds what differs; `extends: preset-or-path` names the one that holds the rest. Used by
`pipeline.config.load`.
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
"""The key of a file that names another one; no setting, and gone from the tree."""

_PRESETS = resources.files("pipeline") / "presets"


def preset_names() -> list[str]:
    """Return the names of the presets in the package, sorted."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _PRESETS.iterdir() if p.name[-5:] == ".yaml"
    )


def read_config(preset_or_path: str) -> dict[str, Any]:
    """Read a preset or file, laid over the one it extends, and so on.

    Sections are laid over each other key by key; anything else takes the place of what was there,
    lists too. A relative path after `extends` is looked for beside the file that names it.

    Raises:
        ConfigError: no such preset or file, no YAML of settings, or files that extend each other
            in a circle.
    """
    trees: list[dict[str, Any]] = []
    sources: list[str] = []
    name: str | None = preset_or_path
    folder = Path()
    while name is not None:
        text, source, folder = _text_of(name, folder, sources)
        if source in sources:
            circle = " extends ".join([*sources[sources.index(source) :], source])
            raise ConfigError(f"{circle}; one of them must hold its settings itself")
        sources.append(source)
        tree = _parse(text, source)
        name = _extended(tree, source)
        trees.append(tree)
    merged: dict[str, Any] = {}
    for tree in reversed(trees):
        merged = _laid_over(merged, tree)
    return merged


def _text_of(name: str, folder: Path, sources: list[str]) -> tuple[str, str, Path]:
    """A configuration's text, what to call it, and the folder that its own paths start from."""
    if name in preset_names():
        return (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), name, Path()
    path = folder / Path(name).expanduser()
    if not path.is_file():
        asked = f"{sources[-1]} extends {name!r}, but there is " if sources else ""
        raise ConfigError(
            f"{asked}no preset and no file called {str(path)!r}{_meant(path)} "
            f"{', '.join(preset_names())}"
        )
    try:
        return read_text(path, MAX_FILE_BYTES), str(path.resolve()), path.parent
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _meant(path: Path) -> str:
    """The end of a sentence: the preset, or the file beside `path`, that was probably meant."""
    plain = {_plain(preset): preset for preset in preset_names()}
    files = [*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")]
    plain |= {_plain(file.name): str(file) for file in files}
    wanted = _plain(path.name)
    alike = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.75)
    ends = [one for one in plain if wanted and one.endswith(wanted)]
    meant = alike or (ends if len(ends) == 1 else [])
    return f"; did you mean {plain[meant[0]]}? The presets are" if meant else "; presets are"


def _plain(name: str) -> str:
    """A name without its suffix, and without what people write in several ways."""
    return re.sub(r"[-_. ]", "", re.sub(r"\.ya?ml$", "", name.lower()))


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source} holds no settings; `sam2vx-pipeline config show --config demo` prints some"
        )
    return tree


def _extended(tree: dict[str, Any], source: str) -> str | None:
    """Take `extends` out of the tree."""
    if EXTENDS not in tree:
        return None
    name = tree.pop(EXTENDS)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{source}: {EXTENDS} must be a preset or the path of a file, got {name!r}; presets "
            f"are {', '.join(preset_names())}"
        )
    return name


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            value = _laid_over(under, value)
        merged[key] = value
    return merged
