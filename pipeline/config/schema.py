"""All settings by dotted path, and error messages for invalid ones."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stages.config import Section


class ConfigError(ValueError):
    """An invalid configuration; the message names field, value, range and remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key of the configuration: its path and field."""

    path: str
    field: FieldInfo
    section: type[Section] | None
    """The section's class if the key is a section, else None."""

    @property
    def help(self) -> str:
        """The docstring of the field or section, on one line."""
        text = self.field.description or (self.section.__doc__ if self.section else "") or ""
        return " ".join(text.split())

    @property
    def is_mapping(self) -> bool:
        """Whether the keys below it are chosen by the user."""
        return typing.get_origin(self.field.annotation) is dict

    @property
    def is_optional(self) -> bool:
        """Whether null is allowed."""
        return types.NoneType in typing.get_args(self.field.annotation)


def settings_of(section: type[Section], prefix: str = "") -> Iterator[Setting]:
    """Yield every key of `section` and its subsections, depth first, in order."""
    for name, field in section.model_fields.items():
        inner = _section_class(field.annotation)
        yield Setting(path=prefix + name, field=field, section=inner)
        if inner is not None:
            yield from settings_of(inner, f"{prefix}{name}.")


def _section_class(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def unknown_key(path: str, known: Mapping[str, Setting]) -> str:
    """Error message for an unknown key, with the most similar setting or the valid keys."""
    closest = _closest(path, known)
    if closest:
        return f"unknown key {path}; did you mean {closest}?"
    parent = path.rpartition(".")[0]
    while parent and (parent not in known or known[parent].section is None):
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    names = [p[len(prefix) :] for p in known if p.startswith(prefix)]
    listed = ", ".join(name for name in names if "." not in name)
    return f"unknown key {path}; {parent or 'the configuration'} has {listed}"


def _closest(path: str, known: Mapping[str, Setting]) -> str | None:
    """The setting with the most similar name; the similarity of the paths breaks ties."""
    leaf = path.rpartition(".")[2]
    best: tuple[float, str] | None = None
    for candidate in known:
        name_score = _similarity(leaf, candidate.rpartition(".")[2])
        if name_score >= 0.7:
            score = name_score + 0.5 * _similarity(path, candidate)
            if best is None or score > best[0]:
                best = (score, candidate)
    return best[1] if best else None


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def explain(error: ValidationError, known: Mapping[str, Setting]) -> list[str]:
    """Return a message for each pydantic error, with the setting's help."""
    return [_explain_one(dict(problem), known) for problem in error.errors()]


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list, such as [a, b]",
    "dict": "keys and values",
    "model": "a section with keys of its own",
}

_TEXTS = (_TYPES["string"], _TYPES["path"])


def _explain_one(problem: Mapping[str, Any], known: Mapping[str, Setting]) -> str:
    loc: Sequence[int | str] = problem["loc"]
    path = ".".join(str(part) for part in loc)
    if problem["type"] == "extra_forbidden":
        return unknown_key(path, known)
    if problem["type"] == "missing":
        return with_help(f"{path} is missing", path, known)
    if problem["type"] == "value_error":
        return f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    given = problem["input"]
    remedy = (
        "; put it in quotes" if _expected(problem) in _TEXTS and isinstance(given, Number) else ""
    )
    shown = "null" if given is None else repr(given)
    return with_help(f"{path} must be {_expected(problem)}, got {shown}{remedy}", path, known)


def _expected(problem: Mapping[str, Any]) -> str:
    limits = problem.get("ctx") or {}
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if name in limits:
            return f"{sign} {limits[name]:g}"
    if "multiple_of" in limits:
        return f"a multiple of {limits['multiple_of']:g}"
    if problem["type"] == "literal_error":
        return f"one of {limits['expected']}"
    if problem["type"] in ("too_short", "too_long", "string_too_short"):
        bound = "at least" if "min_length" in limits else "at most"
        return f"{bound} {limits.get('min_length', limits.get('max_length'))} long"
    return _TYPES.get(problem["type"].partition("_")[0], f"different ({problem['msg']})")


def with_help(text: str, path: str, known: Mapping[str, Setting]) -> str:
    """Append the help of the setting at `path`, or of its nearest parent."""
    while path and path not in known:
        path = path.rpartition(".")[0]
    return f"{text}\n    {known[path].help}" if path and known[path].help else text
