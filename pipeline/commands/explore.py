"""`explore`: a page about a cache, served to this machine or written to a file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache_schema import is_url
from cache_schema.atomic_io import make_directories, write_atomic
from pipeline.config.load import NOT_GIVEN, ConfigError, RunConfig
from pipeline.console import CommandResult, format_bytes
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.explore.explorer import Explorer
    from stages.explore.server import ExploreServer

_LIST_NAME = "leave_out.jsonl"


def open_server(
    config: RunConfig, *, cache: str | None, port: int, run: Path | None = None
) -> ExploreServer:
    """Open the cache and bind the server; nothing is answered before `serve`.

    Args:
        config: The whole configuration.
        cache: Folder or URL of stores or of one store; None uses `config.cache`.
        port: 0 takes a free one.
        run: Folder of a run whose student is shown beside the teacher.

    Raises:
        CacheError: There is no store, or a damaged one.
        ValueError: The list of clips to leave out is none.
        OSError: The port is in use.
    """
    from stages.explore.server import ExploreServer

    return ExploreServer(_explorer(config, cache, run), port=port)


def _explorer(config: RunConfig, cache: str | None, run: Path | None = None) -> Explorer:
    from stages.clips import open_dataset
    from stages.explore.explorer import Explorer, Sources
    from stages.explore.leave_out import LeaveOutList
    from stages.explore.stores import open_cache
    from stages.explore.student import RunStudent

    where = cache or config.cache
    root = where if is_url(where) else Path(where)
    dataset, why = None, ""
    if config.data.path == Path(NOT_GIVEN):
        why = "data.path is not set; give --config or data.path=…"
    else:
        try:
            dataset = open_dataset(config.data)
        except ValueError as error:
            why = str(error)
    leave_out = LeaveOutList(config.train.leave_out or config.outputs / _LIST_NAME)
    leave_out.keys()  # a file that is no such list is an error now, not at the first click
    return Explorer(
        sources=Sources(
            cache=where,
            sizes=open_cache(root, config.train.stores),
            data=config.data,
            dataset=dataset,
            no_dataset=why,
            lgf=config.train.lgf,
            leave_out=leave_out,
            student=None
            if run is None
            else RunStudent(
                run, config=config.train, clips=config.data, model=config.model, cache=root
            ),
        )
    )


def serving(server: ExploreServer) -> CommandResult:
    """The address, printed before the server answers."""
    explorer = server.explorer
    sources = explorer.sources
    rows = [
        ("clips", str(explorer.table.num_stored)),
        ("clips to leave out", str(sources.leave_out.path)),
    ]
    notes = [f"frames are not shown: {sources.no_dataset}"] if sources.no_dataset else []
    return CommandResult(
        title=f"explore {sources.cache}",
        rows=rows,
        data={
            "address": server.address,
            "clips": explorer.table.num_stored,
            "leave_out": str(sources.leave_out.path),
        },
        notes=[*notes, f"open {server.address} (Ctrl-C ends the server)"],
    )


def serve(server: ExploreServer) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    sys.stdout.flush()
    server.explorer.start()
    try:
        server.serve_forever()
    finally:
        server.server_close()
        server.explorer.close()


def export(
    config: RunConfig, progress: Progress, *, cache: str | None, out: Path, clips: Sequence[str]
) -> CommandResult:
    """Write some clips as one page, or as a recording for the Rerun viewer.

    Args:
        config: The whole configuration.
        progress: Advanced once per clip.
        cache: As in `open_server`.
        out: The file, whose name ends in .html or .rrd; replaced if it exists.
        clips: Keys of the clips.

    Raises:
        ValueError: A key that the cache does not have, or too many; a name with another ending; the
            Rerun SDK is missing.
    """
    from stages.explore.export import saved_page
    from stages.explore.rerun_file import SUFFIX, import_rerun, write_recording

    is_recording = out.suffix == SUFFIX
    if is_recording:
        import_rerun()
    elif out.suffix != ".html":
        raise ConfigError(
            f"--export {out}: the name must end in .html, for a page, or {SUFFIX}, for a recording "
            "that the Rerun viewer opens"
        )
    explorer = _explorer(config, cache)
    explorer.table.read(threading.Event())
    if is_recording:
        write_recording(explorer, clips, out, progress)
    else:
        make_directories(out.parent)
        write_atomic(out, saved_page(explorer, clips, progress).encode("utf-8"))
    size, kind = out.stat().st_size, "recording" if is_recording else "page"
    return CommandResult(
        title="explore",
        rows=[(kind, str(out)), ("clips", str(len(clips))), ("size", format_bytes(size))],
        data={kind: str(out), "clips": len(clips), "bytes": size},
    )
