"""What `pipeline.cli` and `pipeline.cache_cli` share: options, and how a command is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import console, failures
from pipeline.console import Answer
from stages.progress import Progress

if TYPE_CHECKING:
    from pipeline.config import RunConfig

Config = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        metavar="NAME_OR_PATH",
        help="A preset (demo, cogvideox-2b-lora, cogvideox-5b-lora, cogvideox-5b-i2v-lora, these "
        "three also with -gram-flow; cogvideox-2b-full, cogvideox1.5-5b-lora, "
        "cogvideox1.5-5b-i2v-lora) or a YAML file.",
    ),
]
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


def load_settings(config: str, overrides: list[str] | None, traceback: bool) -> RunConfig:
    """Read the configuration a command was given; what is wrong with it is bad usage."""
    from pipeline.config import load_config

    with failures.failures(traceback=traceback):
        return load_config(config, overrides or [])


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
