"""The command `sam2vx-pipeline explore`: a page about a cache, served to this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import failures
from pipeline.cli_options import (
    Config,
    Json,
    Traceback,
    config_file_of_run,
    load_settings,
    print_result,
    run_command,
)


def explore(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CACHE KEY=VALUE",
            help="A folder of stores, or one store, or the URL of either (default: the "
            "configuration's cache); then settings to override, such as data.path=my_clips, whose "
            "frames are shown.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    run: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A training run's folder: use its configuration, and show its student's Gram "
            "flow beside the teacher's.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 0,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Write the clips named by --clips and exit: to FILE.html as one page without a "
            "server, or to FILE.rrd as a recording for the Rerun viewer.",
        ),
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option("--clips", metavar="KEY", help="With --export: a clip; repeatable."),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Look through a cache's clips in the browser: search, filter, tracks, Gram flow.

    The page is served to this machine alone; open the printed address. Clips that should go are
    put on a list that train.leave_out and cache drop --from read; nothing else is written.

    sam2vx-pipeline explore cache --config mine.yaml
    """
    from pipeline.commands import explore as command

    if (export is None) != (not clips):
        raise typer.BadParameter("--export and --clips need each other")
    cache, overrides = None, list(arguments or [])
    if overrides and ("=" not in overrides[0] or Path(overrides[0]).exists()):
        cache = overrides.pop(0)
    if run is not None and config is None:
        config = config_file_of_run(run)
    settings = load_settings(config, overrides, traceback, needed=())
    if export is not None:
        result = run_command(
            lambda p: command.export(settings, p, cache=cache, out=export, clips=clips or []),
            traceback,
        )
        print_result(result, as_json)
        return
    with failures.exit_on_error(traceback=traceback):
        server = command.open_server(settings, cache=cache, port=port, run=run)
        print_result(command.serving(server), as_json)
        command.serve(server)
