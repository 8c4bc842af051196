"""Reading and writing of YAML 1.2: settings, and SAM2's configurations.

In YAML 1.1, which many libraries still read, `1e-4` is a string, `on` is true, `010` is eight, and
the second value of a duplicate key silently wins. Each of these can silently change a training run.

Files may be untrusted: their size in memory is bounded before any value is constructed.
"""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from stages.files.text import read_text

MAX_FILE_BYTES = 1 << 20
"""Largest YAML file."""

_MAX_SIZE = 1 << 20
"""Maximum number of values and characters in a document, with aliases expanded."""

_MAX_DEPTH = 64

_MAX_INTEGER = 2**64
"""Integers must be smaller in magnitude; Python refuses to print much larger ones."""


_PLAIN = re.compile("[A-Za-z_/]")
"""Text that starts like this may be written without quotes."""


class YamlError(ValueError):
    """The text is not YAML accepted by this project; the message names the line."""


class _Constructor(SafeConstructor):
    """Reads dates as strings, since no setting is a date, and bounds integers."""

    def construct_yaml_int(self, node: ScalarNode) -> int:
        number = int(super().construct_yaml_int(node))
        if abs(number) >= _MAX_INTEGER:
            raise ConstructorError(None, None, "integer of more than 64 bits", node.start_mark)
        return number


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)
_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    """Quotes every string that does not start like a plain word.

    The library cannot read back its own `{key: :text}` and `{key: ?text}`, and loses a no-break
    space at either end.
    """

    def represent_str(self, data: str) -> ScalarNode:
        style = None if _PLAIN.match(data) and data == data.strip() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def read_yaml(path: Path) -> Any:
    """Return the value stored in a YAML file of at most `MAX_FILE_BYTES`.

    Raises:
        YamlError: as `parse_yaml`; or the file is larger, or not UTF-8.
        OSError: the file cannot be read, or is not a regular file.
    """
    try:
        text = read_text(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise YamlError(str(error)) from error
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document.

    Raises:
        YamlError: the text is not YAML of plain values, a mapping has a duplicate key, or the
            values are too many, too large or nested too deeply.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        _check_size(text)
        return yaml.load(text)
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"{where}{error.problem}") from error
    except (YAMLError, ValueError, OverflowError) as error:
        raise YamlError(str(error)) from error


def _check_size(text: str) -> None:
    """Reject a document that is too large with aliases expanded, using only parser events."""
    sizes: dict[str, int | None] = {}  # by anchor; None inside its collection
    opened: list[tuple[str | None, int]] = []  # anchors and the size before each collection
    size = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
        elif isinstance(event, NodeEvent):
            anchor, before = event.anchor, size
            size += 1
            if isinstance(event, ScalarEvent):
                size += len(event.value)
            elif isinstance(event, AliasEvent):
                aliased = sizes.get(anchor, 0)  # the composer rejects unknown anchors
                if aliased is None:
                    raise YamlError(f"{_line(event)}alias *{anchor} refers to itself")
                anchor, size = None, size + aliased
            elif isinstance(event, CollectionStartEvent):
                opened.append((anchor, before))
                if len(opened) > _MAX_DEPTH:
                    raise YamlError(f"{_line(event)}nested more than {_MAX_DEPTH} levels deep")
        else:
            continue
        if size > _MAX_SIZE:
            raise YamlError(
                f"{_line(event)}more than {_MAX_SIZE} values and characters, with aliases expanded"
            )
        if anchor is not None:
            sizes[anchor] = None if isinstance(event, CollectionStartEvent) else size - before


def _line(event: NodeEvent | CollectionEndEvent) -> str:
    return f"line {event.start_mark.line + 1}: "


def dump_value(value: Any) -> str:
    """Format a value on one line, so that `parse_yaml` returns it unchanged."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = True
    yaml.allow_unicode = True
    yaml.width = 10**6
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue().removesuffix("...\n").strip("\n")
