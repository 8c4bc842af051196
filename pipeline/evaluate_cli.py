"""The command `sam2vx-pipeline evaluate`, which scores generated videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    Config,
    Json,
    Traceback,
    config_file_of_run,
    load_settings,
    print_result,
    run_command,
)


def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VIDEOS] [KEY=VALUE]...",
            help="Folder of generated videos, unless --run is given; settings to override.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|base",
            help="Sample videos from a training run, from an export, or from the base model, and "
            "score them.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="VIDEOS|RUN|base",
            help="What to compare with, paired by prompt and seed; RUN and base need --run.",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="With --run: prompts as for sample; default: the captions of the run's held-out "
            "clips, for image-to-video with their first frames.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="CLIPS",
            help="Real clips to measure the videos against: a folder of videos, or what data.path "
            "may be; default for image-to-video: the run's held-out clips.",
        ),
    ] = None,
    num: Annotated[
        int,
        typer.Option(min=1, help="With --run: videos per prompt, with seeds from sample.seed on."),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Output folder; default: a folder named after the videos or the run in outputs.",
        ),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Score generated videos by the groups in evaluate.scores, and compare two sets of them.

    Writes scores.jsonl, scores.csv, summary.json and a page that shows the videos beside their
    scores. Run again, it keeps the videos and tracks that are there.

    sam2vx-pipeline evaluate --run runs/lgf --against base --num 3

    sam2vx-pipeline evaluate outputs/lgf --against outputs/base --config mine.yaml

    sam2vx-pipeline evaluate outputs/lgf --reference my_clips --config mine.yaml
    """
    from pipeline.commands import evaluate as command

    videos, overrides = None, list(arguments or [])
    if overrides and ("=" not in overrides[0] or Path(overrides[0]).exists()):
        videos = Path(overrides.pop(0))
    if (videos is None) == (run is None):
        raise typer.BadParameter("name a folder of videos, or a run with --run RUN")
    if run is None and (prompt_file is not None or num > 1):
        raise typer.BadParameter("--prompt-file and --num are for videos to sample; add --run RUN")
    settings = load_settings(
        config or config_file_of_run(None if run is None else Path(run)),
        overrides,
        traceback,
        needed=() if run is None else ("model.path",),
    )
    options = command.EvaluateOptions(
        videos=videos,
        run=run,
        against=against,
        prompt_file=prompt_file,
        reference=reference,
        num=num,
        out=out,
    )
    result = run_command(lambda p: command.run(settings, p, options), traceback, resumable=True)
    print_result(result, as_json)
