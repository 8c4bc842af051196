"""`cache drop`: clips out of one store, or of every store of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache_schema import StoreReader
from cache_schema.maintenance.drop import DROPPED, REDO, drop_clips
from pipeline.commands.maintenance.stores import (
    Outcome,
    Where,
    counted,
    each_store,
    indented,
    list_failures_again,
    stores_at,
)
from pipeline.console import Answer
from stages.progress import Progress
from stages.train_student.data.splits import read_keys

_SHOWN = 5


def run(
    cache: Path,
    keys: Sequence[str],
    progress: Progress,
    *,
    listed: Path | None,
    because: str,
    redo: bool = False,
) -> Answer:
    """Take clips out of the stores that have them; run again, it finishes what was begun.

    Args:
        cache: A store, or a folder of stores.
        keys: The clips.
        progress: Told of the stores.
        listed: A file that names more clips, one JSON object with a `key` per line.
        because: Why, in words.
        redo: Whether extraction is to make them again, when it is told to retry.

    Raises:
        ValueError: No store knows one of the clips; nothing was done.
    """
    wanted = set(keys) | (read_keys(listed) if listed is not None else frozenset())
    stores = stores_at(cache)
    of_store = {store: _known(store, wanted) for store in stores}
    unknown = sorted(wanted - set().union(*of_store.values()))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise ValueError(
            f"no store of {cache} knows clip {', '.join(map(repr, unknown[:_SHOWN]))}{more}; "
            "nothing was dropped. Keys are written as inspect and failures.jsonl show them"
        )

    reason = REDO if redo else DROPPED
    again = (
        "extract-features --retry-failed makes them again"
        if redo
        else "extract-features leaves them out, now and later; --redo lets it make them again"
    )

    with progress.task("drop", len(stores), unit="stores") as task:

        def drop(store: Where) -> Outcome:
            report = drop_clips(Path(store), sorted(of_store[store]), detail=because, reason=reason)
            task.advance()
            already = f", {report.num_already} already" if report.num_already else ""
            return Outcome(
                rows=indented([("clips", f"{report.num_dropped} dropped{already}")]),
                data={
                    "dropped": report.num_dropped,
                    "already_dropped": report.num_already,
                    "shards": list(report.shards),
                },
            )

        answer = each_store(
            stores,
            drop,
            title=lambda found: f"dropped from {counted(len(found), 'store')}: {cache}",
            notes=[f"{counted(len(wanted), 'clip')} named; {again}"],
        )
    list_failures_again(stores, progress)
    return answer


def _known(store: Where, wanted: set[str]) -> set[str]:
    """Those of the clips that the store has, or has skipped."""
    reader = StoreReader(store)
    skipped = {clip.key for clip in reader.iter_skipped() if clip.key in wanted}
    return skipped.union(key for key in wanted if key in reader)
