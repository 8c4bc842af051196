"""YAML 1.2 as this project reads and writes it; used by `pipeline.config` and `config show`.

In YAML 1.1, which many libraries still read, `1e-4` is text, `on` is true, `010` is eight, and a
key given twice silently takes its second value. Each of those has spoilt a training run somewhere.
"""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter


class YamlError(ValueError):
    """The text is not YAML that this project reads; the message says where."""


class _Constructor(SafeConstructor):
    """A date is text: nothing here is set to one."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    """Quotes text that would not be read back: the library does not read its own `{key: :text}`,
    and a no-break space at an end gets lost.
    """

    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if data.startswith(":") or data != data.strip() else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def parse_yaml(text: str) -> Any:
    """Return the value that one YAML document holds.

    Raises:
        YamlError: the text is not YAML of plain values, or a mapping has a key twice.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"{where}{error.problem}") from error
    except (YAMLError, ValueError) as error:
        raise YamlError(str(error)) from error


def dump_value(value: Any) -> str:
    """Write one value on one line, so that `parse_yaml` returns it unchanged."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = True
    yaml.allow_unicode = True
    yaml.width = 10**6
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue().removesuffix("...\n").strip("\n")
