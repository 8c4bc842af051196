"""Options shared by several commands, and helpers to run a command and print its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from pipeline import console, failures
from pipeline.console import CommandResult
from stages.progress import Progress

if TYPE_CHECKING:
    from pipeline.config.load import RunConfig

_CONFIG = typer.Option(
    "--config",
    "-c",
    metavar="NAME_OR_PATH",
    help="A preset (demo, demo-i2v, cogvideox-2b-lora, cogvideox-5b-lora, cogvideox-5b-i2v-lora, "
    "these three also with -gram-flow; cogvideox-2b-full, cogvideox1.5-5b-lora, "
    "cogvideox1.5-5b-i2v-lora) or a YAML file; without it, only the settings given here apply. "
    "Relative paths are resolved from the current folder, that of `extends:` from its own file.",
    show_default=False,
)
Config = Annotated[str | None, _CONFIG]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings to override, such as train.steps=20; config show --config demo lists all.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", envvar="SAM2VX_TRACEBACK", help="Show the traceback of an error."),
]


def load_settings(
    config: str | None,
    overrides: list[str] | None,
    traceback: bool,
    *,
    needed: Sequence[str] | None = None,
) -> RunConfig:
    """Load the configuration of a command, and limit threads where it has the demo's models.

    Errors exit with the code for bad usage.

    Args:
        config: preset name or path; None uses `overrides` only.
        overrides: `key.key=value` arguments.
        traceback: let errors propagate with their traceback.
        needed: the settings without a default that the command reads; None requires all of them.
    """
    from pipeline.commands.assets import limit_threads
    from pipeline.config.load import NEEDED, load_config

    with failures.exit_on_error(traceback=traceback):
        loaded = load_config(config, overrides or [], needed=NEEDED if needed is None else needed)
        limit_threads(loaded)
        return loaded


def config_file_of_run(run: Path | None) -> str | None:
    """Path of the configuration saved in a training run's folder; None if there is none.

    Of a folder that holds the runs of two experts, it is that of the first.
    """
    from stages.config import Expert
    from stages.train_student.logging.rows import CONFIG_FILE

    if run is None:
        return None
    files = [run / name / CONFIG_FILE for name in ("", *get_args(Expert))]
    return next((str(file) for file in files if file.is_file()), None)


def run_command(
    work: Callable[[Progress], CommandResult], traceback: bool, *, resumable: bool = False
) -> CommandResult:
    """Run a command's work with progress bars on stderr and nothing on stdout.

    Args:
        work: called with the progress to report to.
        traceback: let errors propagate with their traceback.
        resumable: whether running the same command again resumes interrupted work.
    """
    with (
        failures.exit_on_error(traceback=traceback, resumable=resumable),
        console.stdout_to_stderr(),
        console.console_progress() as progress,
    ):
        return work(progress)


def print_result(result: CommandResult, as_json: bool) -> None:
    """Print the result, and exit with its exit code if that is not 0."""
    console.write_result(result, as_json=as_json)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
