"""The commands `sam2vx-pipeline cache …`, which maintain stores.

They take folders as arguments and read no configuration, except `derive`.
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
    load_settings,
    print_result,
    run_command,
)

cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
derive_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
cache_app.add_typer(derive_app, name="derive", help="Compute one store from another.")


def _local(text: str) -> Path:
    """A local folder, existing or not."""
    if "://" in text:
        raise typer.BadParameter(
            f"{text} is a URL, but stores can only be changed in local folders; change the local "
            "store it was copied from, then copy it again with sam2vx-pipeline cache copy"
        )
    return Path(text)


def _there(text: str) -> Path:
    """An existing local folder."""
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
    """List stores: kind, clips, size, schema version, settings, date and version of the writer.

    sam2vx-pipeline cache list cache
    """
    from pipeline.commands.maintenance import listing as command

    print_result(run_command(lambda p: command.run(cache, p), traceback), as_json)


@cache_app.command()
def verify(
    cache: Readable,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Compare file listings and sizes only; read no data."),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Check every committed byte against its checksum; changes nothing, exits with 1 on problems.

    sam2vx-pipeline cache verify cache
    """
    from pipeline.commands.maintenance import verify as command

    print_result(run_command(lambda p: command.run(cache, p, fast=fast), traceback), as_json)


@cache_app.command()
def repair(cache: Writable, as_json: Json = False, traceback: Traceback = False) -> None:
    """Check like verify, quarantine what is damaged, and keep the rest.

    Removed files are moved to the store's quarantine folder; extract-features --retry-failed
    recomputes the clips.

    sam2vx-pipeline cache repair cache
    """
    from pipeline.commands.maintenance import repair as command

    print_result(run_command(lambda p: command.run(cache, p), traceback, resumable=True), as_json)


@cache_app.command()
def index(cache: Writable, as_json: Json = False, traceback: Traceback = False) -> None:
    """Write each store's index and attribute table anew where they lack clips.

    extract-features does so at the end of a run. Stores that were made without an attribute table,
    merged or repaired list their clips' quality and captions slowly until then.

    sam2vx-pipeline cache index cache
    """
    from pipeline.commands.maintenance import index as command

    print_result(run_command(lambda p: command.run(cache, p), traceback, resumable=True), as_json)


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
            help='File of clips to drop: JSON lines with a "key" each, like failures.jsonl.',
        ),
    ] = None,
    because: Annotated[
        str, typer.Option(help="The reason, recorded with the clips and in failures.jsonl.")
    ] = "by cache drop",
    redo: Annotated[
        bool,
        typer.Option("--redo", help="Let extract-features --retry-failed recompute the clips."),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Remove clips from one store, or from every store of a folder.

    A dropped clip counts as skipped: extract-features leaves it out, even with --retry-failed,
    unless it was dropped with --redo.

    sam2vx-pipeline cache drop cache walk/0017 --because "a cut in the middle"
    """
    from pipeline.commands.maintenance import drop as command

    if not keys and listed is None:
        raise typer.BadParameter("name the clips to drop, or list them in a file: --from FILE")
    print_result(
        run_command(
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
            help="The folder of stores, or the store, to merge into; created if missing.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE_OR_STORE",
            parser=_there,
            help="Folders of stores, or stores, to merge from; they are not changed.",
            show_default=False,
        ),
    ],
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Prefix for the names of the incoming shards, for when both sides use the same "
            "names for different shards.",
        ),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Merge stores of several machines by kind and settings; every clip is verified.

    sam2vx-pipeline cache merge cache node1/cache node2/cache
    """
    from pipeline.commands.maintenance import merge as command

    print_result(
        run_command(
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
            help="The folder or URL to copy into; a store keeps its name.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Copy stores to another disk or an object store; a rerun copies only what is missing.

    sam2vx-pipeline cache copy cache s3://bucket/cache
    """
    from pipeline.commands.maintenance import copying as command

    print_result(
        run_command(lambda p: command.run(source, target, p), traceback, resumable=True), as_json
    )


@derive_app.command("gram-flow")
def derive_gram_flow(
    overrides: Overrides = None,
    config: Config = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Compute the Gram-flow store, the teacher's compact form, from its stored features.

    extract.gram_flow sets the window and the number format.

    sam2vx-pipeline cache derive gram-flow --config mine.yaml extract.gram_flow.radius=4
    """
    from pipeline.commands.maintenance import derive as command

    settings = load_settings(config, overrides, traceback, needed=())
    print_result(
        run_command(lambda p: command.run(settings, p), traceback, resumable=True), as_json
    )
