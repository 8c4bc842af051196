"""The resolved configuration as YAML, each field preceded by its help."""

import textwrap
from typing import Any

from pipeline.config.load import SETTINGS, RunConfig
from stages.files.yaml import dump_value

_HEADER = (
    "# Relative paths are resolved from the folder in which a command runs, that of `extends:`",
    "# from its own file.",
)


def commented_yaml(config: RunConfig) -> str:
    """Return YAML that `load_config` reads back to an equal configuration."""
    values: Any = config.model_dump(mode="json")
    lines = list(_HEADER)
    for path, setting in SETTINGS.items():
        section_values: Any = values
        *parents, leaf = path.split(".")
        for parent in parents:
            section_values = section_values[parent] if section_values is not None else None
        if section_values is None:  # the section is null
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
        value = section_values[leaf]
        if setting.section is not None and value is not None:
            lines.append(f"{indent}{leaf}:")
        else:
            lines.append(f"{indent}{leaf}: {dump_value(value)}")
    return "\n".join(lines) + "\n"
