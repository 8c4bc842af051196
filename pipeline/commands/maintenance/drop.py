"""`cache drop`: remove clips from one store or from every store of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache_schema import StoreReader
from cache_schema.maintenance.drop import DROPPED, REDO, drop_clips
from cache_schema.shown_text import first_few
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    indented,
    pluralize,
    run_on_each_store,
    stores_at,
    update_failures_file,
)
from pipeline.console import CommandResult, json_values
from stages.progress import Progress
from stages.train_student.data.splits import read_keys

_MAX_KEYS = 5
"""Keys listed in an error message."""


def run(
    cache: Path,
    keys: Sequence[str],
    progress: Progress,
    *,
    listed: Path | None,
    because: str,
    redo: bool = False,
) -> CommandResult:
    """Remove clips from the stores that have them; a rerun completes an interrupted one.

    Args:
        cache: A store, or a folder of stores.
        keys: Keys of the clips.
        progress: Advanced once per store.
        listed: A file with more keys: one JSON object with a `key` per line.
        because: The reason, recorded with the clips.
        redo: Whether extraction may recompute the clips with --retry-failed.

    Raises:
        ValueError: A clip is in no store; nothing was dropped.
    """
    wanted = set(keys) | (read_keys(listed) if listed is not None else frozenset())
    stores = stores_at(cache)
    of_store = {store: _known(store, wanted) for store in stores}
    unknown = sorted(wanted - set().union(*of_store.values()))
    if unknown:
        raise ValueError(
            f"no store of {cache} has clip {first_few(list(map(repr, unknown)), _MAX_KEYS)}; "
            "nothing was dropped. Write keys as inspect and failures.jsonl show them"
        )

    reason = REDO if redo else DROPPED
    effect = (
        "extract-features --retry-failed recomputes them"
        if redo
        else "extract-features leaves them out from now on, unless they are dropped with --redo"
    )

    with progress.task("drop", len(stores), unit="stores") as task:

        def drop(store: PathOrUrl) -> Outcome:
            report = drop_clips(Path(store), sorted(of_store[store]), detail=because, reason=reason)
            task.advance()
            already = (
                f", {report.num_already_dropped} already" if report.num_already_dropped else ""
            )
            return Outcome(
                rows=indented([("clips", f"{report.num_dropped} dropped{already}")]),
                data=json_values(report),
            )

        result = run_on_each_store(
            stores,
            drop,
            title=lambda found: f"dropped from {pluralize(len(found), 'store')}: {cache}",
            notes=[f"{pluralize(len(wanted), 'clip')} named; {effect}"],
        )
    update_failures_file(stores, progress)
    return result


def _known(store: PathOrUrl, wanted: set[str]) -> set[str]:
    """The wanted clips that are in the store or among its skipped clips."""
    reader = StoreReader(store)
    skipped = {clip.key for clip in reader.iter_skipped() if clip.key in wanted}
    return skipped.union(key for key in wanted if key in reader)
