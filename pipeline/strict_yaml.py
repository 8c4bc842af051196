"""YAML as this project reads it: 1.2 scalars, no duplicate keys; used by `pipeline.config`.

PyYAML follows YAML 1.1, where `1e-4` is text, `on` is true, `010` is eight and a key given twice
silently takes its second value. Each of those has spoilt a training run somewhere.
"""

import re
from typing import Any

import yaml


class YamlError(ValueError):
    """The text is not YAML that this project reads; the message says where."""


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice, naming both lines."""
        lines: dict[object, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise YamlError(f"line {line}: the key {key!r} is not text; put it in quotes")
            if key in lines:
                raise YamlError(
                    f"line {line}: key {key!r} is given twice (first on line {lines[key]}); "
                    "keep one of them"
                )
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
        list("-+.0123456789"),
    ),
)
for _tag, _pattern, _first in _SCALARS:
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str) -> Any:
    """Return the value that one YAML document holds.

    Raises:
        YamlError: the text is not YAML, or a mapping has a key twice or a key that is not text.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(where + (getattr(error, "problem", None) or str(error))) from error


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads back as the same value."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    # Text is quoted whenever either the 1.1 or the 1.2 rules would take it for something else.
    first: list(yaml.SafeDumper.yaml_implicit_resolvers.get(first, []))
    + list(_StrictLoader.yaml_implicit_resolvers.get(first, []))
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_StrictLoader.yaml_implicit_resolvers}
}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text else None  # keeps every value on its own line
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_value(value: Any) -> str:
    """Write one value on one line, so that `parse_yaml` returns it unchanged."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=10**6
    )
    return text.removesuffix("...\n").strip()
