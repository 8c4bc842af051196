"""The commands `sam2vx-pipeline preference`: blind comparison of videos by people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import Json, Traceback, print_result, run_command

preference_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Seed = Annotated[int, typer.Option(min=0, help="Decides order, places, checks and resampling.")]


@preference_app.command()
def make(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="VIDEOS VIDEOS...",
            exists=True,
            file_okay=False,
            help="Folders of videos of the same prompts and seeds, one per model.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder to write; must be empty or new.")
    ],
    checks: Annotated[
        int,
        typer.Option(min=0, help="Attention checks: a video beside a broken copy of itself."),
    ] = 3,
    seed: Seed = 0,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write a page that shows two videos at a time, in random places, and asks which is better.

    Give people the page and its folder of videos, keep key.json; the page gives back a file of
    answers.

    sam2vx-pipeline preference make videos/lgf videos/base --out preference
    """
    from pipeline.commands import preference as command

    result = run_command(lambda _: command.make(folders, out, checks=checks, seed=seed), traceback)
    print_result(result, as_json)


@preference_app.command()
def read(
    key: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="key.json of the page.")],
    answers: Annotated[
        list[Path],
        typer.Argument(
            metavar="ANSWERS...", exists=True, dir_okay=False, help="People's files of answers."
        ),
    ],
    seed: Seed = 0,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Print win rates with 95% intervals, agreement among people, and answers that look careless.

    sam2vx-pipeline preference read preference/key.json answers-*.json
    """
    from pipeline.commands import preference as command

    result = run_command(lambda _: command.read(key, answers, seed=seed), traceback)
    print_result(result, as_json)
