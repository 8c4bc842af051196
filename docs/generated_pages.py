"""Sphinx extension that fills in what the code says itself: the settings and the commands.

A page has `<!-- generated: settings -->` or `<!-- generated: commands -->` where it stands.
"""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

_PROGRAMS = ("sam2vx-pipeline", "torchrun", "deepspeed")


def settings() -> Iterator[str]:
    """Blocks of Markdown: a table of settings for each section of the configuration."""
    from pipeline.config.load import SETTINGS

    header = "| setting | default | meaning |\n|---|---|---|"
    sections: dict[str, list[str]] = {}
    for path, setting in SETTINGS.items():
        top = path.split(".")[0] if "." in path or setting.section is not None else ""
        rows = sections.setdefault(top, [])
        if setting.section is None:
            rows.append(f"| `{path}` | {_default(setting.field)} | {_cell(setting.help)} |")
    for top, rows in sections.items():
        if top:
            yield f"## {top}"
            yield SETTINGS[top].help
        yield "\n".join([header, *rows])


def _default(field: Any) -> str:
    from stages.files.yaml import dump_value

    if field.is_required():
        return "required"
    value = field.default
    value = list(value) if isinstance(value, tuple) else value
    plain = isinstance(value, (str, int, float, list, dict)) or value is None
    return f"`{_cell(dump_value(value if plain else str(value)))}`"


def commands() -> Iterator[str]:
    """Blocks of Markdown: each command with its arguments and options."""
    from typer.main import get_command

    from pipeline.cli import app

    yield from _commands(get_command(app), "sam2vx-pipeline")


def _commands(command: Any, name: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is not None:
        for child, found in sorted(children.items()):
            if not found.hidden:
                yield from _commands(found, f"{name} {child}")
        return
    yield f"## {name.removeprefix('sam2vx-pipeline ')}"
    yield f"```\n{name} {' '.join(_usage(command))}\n```"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        # Click marks paragraphs that are not to be wrapped, such as examples, with a line of \b.
        kept = paragraph.removeprefix("\b\n")
        is_example = kept.lstrip().startswith(_PROGRAMS)
        yield f"```\n{textwrap.dedent(kept)}\n```" if is_example else kept
    options = [one for one in command.params if one.param_type_name == "option"]
    rows = [
        f"| {', '.join(f'`{flag}`' for flag in (*one.opts, *one.secondary_opts))} "
        f"| {_cell(one.help or '')} |"
        for one in options
        if not one.hidden
    ]
    yield "\n".join(["| option | meaning |", "|---|---|", *rows])


def _usage(command: Any) -> Iterator[str]:
    for one in command.params:
        if one.param_type_name == "argument" and not one.hidden:
            many = "…" if one.nargs != 1 else ""
            word = f"{one.name.upper()}{many}"
            yield word if one.required else f"[{word}]"
    yield "[OPTIONS]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


_GENERATED = {"settings": settings, "commands": commands}


def _fill(app: Any, docname: str, source: list[str]) -> None:
    for name, blocks in _GENERATED.items():
        marker = f"<!-- generated: {name} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, "\n\n".join(blocks()))


def setup(app: Any) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
