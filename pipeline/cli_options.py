"""What `pipeline.cli` and `pipeline.cache_cli` share: options, and how a command is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import console, failures
from pipeline.console import Answer
from stages.progress import Progress

if TYPE_CHECKING:
    from pipeline.config.load import RunConfig

_CONFIG = typer.Option(
    "--config",
    "-c",
    metavar="NAME_OR_PATH",
    help="A preset (demo, cogvideox-2b-lora, cogvideox-5b-lora, cogvideox-5b-i2v-lora, these "
    "three also with -gram-flow; cogvideox-2b-full, cogvideox1.5-5b-lora, "
    "cogvideox1.5-5b-i2v-lora) or a YAML file; without it, the settings given here. Relative paths "
    "of settings start from the current folder, that of `extends:` from the file it stands in.",
    show_default=False,
)
Config = Annotated[str | None, _CONFIG]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings to change, such as train.steps=20; config show lists them all.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", envvar="SAM2VX_TRACEBACK", help="Show where an error comes from."),
]


def load_settings(
    config: str | None,
    overrides: list[str] | None,
    traceback: bool,
    *,
    needed: Sequence[str] | None = None,
) -> RunConfig:
    """Read the configuration a command was given; what is wrong with it is bad usage.

    Args:
        config: a preset or file; None where only `overrides` are given.
        overrides: as they were given.
        traceback: let errors through.
        needed: those settings without a default that the command reads; None is all of them.
    """
    from pipeline.config.load import NEEDED, load_config

    with failures.failures(traceback=traceback):
        return load_config(config, overrides or [], needed=NEEDED if needed is None else needed)


def settings_of_run(run: Path | None) -> str | None:
    """The configuration that a training run keeps in its folder; None if it has none."""
    from stages.train_student.logging.rows import CONFIG_FILE

    file = None if run is None else run / CONFIG_FILE
    return str(file) if file is not None and file.is_file() else None


def carry_out(
    work: Callable[[Progress], Answer], traceback: bool, *, resumable: bool = False
) -> Answer:
    """Do a command's work with bars on stderr and nothing on stdout."""
    with (
        failures.failures(traceback=traceback, resumable=resumable),
        console.stdout_for_the_answer(),
        console.console_progress() as progress,
    ):
        return work(progress)


def finish(answer: Answer, as_json: bool) -> None:
    """Print the answer, and exit with its code where that is not 0."""
    console.present(answer, as_json=as_json)
    if answer.exit_code:
        raise typer.Exit(answer.exit_code)
