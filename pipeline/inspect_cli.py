"""The command `sam2vx-pipeline inspect`, which draws clips or lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import Config, Json, Traceback, load_settings, print_result, run_command
from pipeline.console import CommandResult
from stages.progress import Progress


def inspect(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STORE KEY=VALUE",
            help="The store: teacher or gram_flow (default: the one that train.teacher_form "
            "names), masks (the default with --overlay), latents, text, or a store's folder; then "
            "settings to override.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    clip: Annotated[
        str | None, typer.Option("--clip", help="The clip's key; default: the store's first.")
    ] = None,
    every_clip: Annotated[bool, typer.Option("--all", help="Draw every clip.")] = False,
    overlay: Annotated[
        bool,
        typer.Option("--overlay", help="Draw the tracked masks over the clip's frames."),
    ] = False,
    listing: Annotated[
        bool,
        typer.Option(
            "--list", help="List the clips with quality, lost frames and prompt; draw nothing."
        ),
    ] = False,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="With --list: sort by this column, such as quality (worst first) or -lost.",
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="With --list: print CSV.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print every setting and the clip's whole record."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the image and the video.")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Summarise a store, and draw a clip: frames, features as colours, flow, or masks.

    sam2vx-pipeline inspect --config mine.yaml --list --sort quality
    """
    from pipeline.commands import inspect as command
    from pipeline.commands.inspect_list import list_clips

    store, overrides = None, list(arguments or [])
    if overrides and ("=" not in overrides[0] or Path(overrides[0]).exists()):
        store = overrides.pop(0)
    if clip is not None and every_clip:
        raise typer.BadParameter("--all draws every clip; remove --clip")
    if listing and (clip is not None or every_clip or out is not None or verbose):
        raise typer.BadParameter("--list draws nothing; remove --clip, --all, --out and --verbose")
    if not listing and (sort is not None or as_csv):
        raise typer.BadParameter("--sort and --csv need --list")
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other; give one of them")
    settings = load_settings(config, overrides, traceback, needed=())

    def work(progress: Progress) -> CommandResult:
        if listing:
            reader = command.open_store(settings, store, overlay=overlay)
            return list_clips(reader, sort=sort, as_csv=as_csv)
        return command.run(
            settings,
            progress,
            store=store,
            clip=clip,
            every_clip=every_clip,
            overlay=overlay,
            verbose=verbose,
            out=out,
        )

    result = run_command(work, traceback)
    print_result(result, as_json)
