"""The resolved configuration as YAML with each field's help above it, for `config show`."""

import textwrap
from typing import Any

from pipeline.config.load import SETTINGS, RunConfig
from stages.files.yaml import dump_value

_WHERE = (
    "# Relative paths start from the folder in which a command runs; that of `extends:` from the",
    "# folder of the file it stands in.",
)


def commented_yaml(config: RunConfig) -> str:
    """Return YAML that `load_config` reads back as an equal configuration."""
    values: Any = config.model_dump(mode="json")
    lines = list(_WHERE)
    for path, setting in SETTINGS.items():
        holder: Any = values
        *parents, leaf = path.split(".")
        for parent in parents:
            holder = holder[parent] if holder is not None else None
        if holder is None:  # a key of a section that is null
            continue
        indent = "  " * len(parents)
        if setting.section is not None and not parents:
            lines.append("")
        lines += textwrap.wrap(
            setting.help,
            width=96,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_on_hyphens=False,
        )
        value = holder[leaf]
        if setting.section is not None and value is not None:
            lines.append(f"{indent}{leaf}:")
        else:
            lines.append(f"{indent}{leaf}: {dump_value(value)}")
    return "\n".join(lines) + "\n"
