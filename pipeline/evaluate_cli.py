"""The command `sam2vx-pipeline evaluate`, which scores generated videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    Config,
    Json,
    Overrides,
    Traceback,
    load_settings,
    print_result,
    run_command,
)


def evaluate(
    videos: Annotated[
        Path,
        typer.Argument(
            metavar="VIDEOS", exists=True, file_okay=False, help="Folder of generated videos."
        ),
    ],
    overrides: Overrides = None,
    config: Config = None,
    against: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of videos to compare with, paired by prompt and seed.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Output folder; default: a folder named after VIDEOS in outputs.",
        ),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Score generated videos by the groups in evaluate.scores, and compare two folders of them.

    Writes scores.jsonl, scores.csv, summary.json and a page that shows the videos beside their
    scores. Run again, it keeps the tracks that are there.

    sam2vx-pipeline evaluate outputs/lgf --against outputs/base --config mine.yaml
    """
    from pipeline.commands import evaluate as command

    settings = load_settings(config, overrides, traceback, needed=())
    result = run_command(
        lambda p: command.run(settings, p, videos=videos, against=against, out=out),
        traceback,
        resumable=True,
    )
    print_result(result, as_json)
