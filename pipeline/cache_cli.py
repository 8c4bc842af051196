"""The commands `sam2vx-pipeline cache …`: looking after the stores, once they are written.

They take folders as they are given and read no configuration, but for `derive`, which computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    Config,
    Json,
    Overrides,
    Traceback,
    carry_out,
    finish,
    load_settings,
)

cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
derive_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
cache_app.add_typer(derive_app, name="derive", help="Make one store from another.")


def _local(text: str) -> Path:
    """A folder on this machine, whether it is there yet or not."""
    if "://" in text:
        raise typer.BadParameter(
            f"{text} is a URL, and stores are changed in local folders alone; change the store "
            "that it was copied from, and copy it again: sam2vx-pipeline cache copy"
        )
    return Path(text)


def _there(text: str) -> Path:
    """A folder on this machine that is there."""
    folder = _local(text)
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {text}")
    return folder


Readable = Annotated[
    str,
    typer.Argument(
        metavar="CACHE_OR_STORE",
        help="A folder of stores, or one store; or the URL of either.",
        show_default=False,
    ),
]
Writable = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE_OR_STORE",
        parser=_there,
        help="A folder of stores, or one store.",
        show_default=False,
    ),
]


@cache_app.command("list")
def list_(cache: Readable, as_json: Json = False, traceback: Traceback = False) -> None:
    """List the stores: kind, clips, size, schema version, settings, made when and by what.

    sam2vx-pipeline cache list cache
    """
    from pipeline.commands.maintenance import listing as command

    finish(carry_out(lambda p: command.run(cache, p), traceback), as_json)


@cache_app.command()
def verify(
    cache: Readable,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Compare listings and sizes only; decode nothing."),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Compare every committed byte with its checksum; changes nothing, exits with 1 on problems.

    sam2vx-pipeline cache verify cache
    """
    from pipeline.commands.maintenance import verify as command

    finish(carry_out(lambda p: command.run(cache, p, fast=fast), traceback), as_json)


@cache_app.command()
def repair(cache: Writable, as_json: Json = False, traceback: Traceback = False) -> None:
    """Check as verify does, set aside what is damaged, and keep the rest.

    What is taken out lies in the store's quarantine; extract-features --retry-failed makes it anew.

    sam2vx-pipeline cache repair cache
    """
    from pipeline.commands.maintenance import repair as command

    finish(carry_out(lambda p: command.run(cache, p), traceback, resumable=True), as_json)


@cache_app.command()
def drop(
    cache: Writable,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="CLIP", help="Keys of the clips to drop.", show_default=False),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option(
            "--from",
            exists=True,
            dir_okay=False,
            help='A list of them: JSON lines with a "key" each, like failures.jsonl.',
        ),
    ] = None,
    because: Annotated[
        str, typer.Option(help="Why; kept with the clips, and listed in failures.jsonl.")
    ] = "by cache drop",
    redo: Annotated[
        bool,
        typer.Option("--redo", help="Have extract-features --retry-failed make them again."),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Take clips out, of every store of a folder or of one.

    A dropped clip counts as skipped: extract-features leaves it out, also with --retry-failed,
    unless it was dropped with --redo.

    sam2vx-pipeline cache drop cache walk/0017 --because "a cut in the middle"
    """
    from pipeline.commands.maintenance import drop as command

    if not keys and listed is None:
        raise typer.BadParameter("name the clips to drop, or give a list of them: --from list")
    finish(
        carry_out(
            lambda p: command.run(cache, keys or [], p, listed=listed, because=because, redo=redo),
            traceback,
            resumable=True,
        ),
        as_json,
    )


@cache_app.command()
def merge(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            parser=_local,
            help="The folder of stores, or the store, to merge into; made where there is none.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE_OR_STORE",
            parser=_there,
            help="Folders of stores, or stores, to take from; they stay as they are.",
            show_default=False,
        ),
    ],
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Put before the names of the shards taken, where both sides use the same names "
            "for different shards.",
        ),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Bring stores of several machines together, by kind and settings; each clip is checked.

    sam2vx-pipeline cache merge cache node1/cache node2/cache
    """
    from pipeline.commands.maintenance import merge as command

    finish(
        carry_out(
            lambda p: command.run(target, sources, p, prefix=prefix), traceback, resumable=True
        ),
        as_json,
    )


@cache_app.command()
def copy(
    source: Readable,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="The folder or URL to copy into; a store keeps its name there.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Copy stores to another disk or an object store; again, only what is missing.

    sam2vx-pipeline cache copy cache s3://bucket/cache
    """
    from pipeline.commands.maintenance import copying as command

    finish(carry_out(lambda p: command.run(source, target, p), traceback, resumable=True), as_json)


@derive_app.command("gram-flow")
def derive_gram_flow(
    overrides: Overrides = None,
    config: Config = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Make the Gram-flow store, the compact form of the teacher, from its stored features.

    extract.gram_flow says which window and number format.

    sam2vx-pipeline cache derive gram-flow --config mine.yaml extract.gram_flow.radius=4
    """
    from pipeline.commands.maintenance import derive as command

    settings = load_settings(config, overrides, traceback, needed=())
    finish(carry_out(lambda p: command.run(settings, p), traceback, resumable=True), as_json)
