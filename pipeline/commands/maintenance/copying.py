"""`cache copy`: stores on another disk, or on an object store."""

from __future__ import annotations

from cache_schema.maintenance.copy import copy_store
from pipeline.commands.maintenance.stores import (
    Outcome,
    Where,
    bar_of_bytes,
    counted,
    each_store,
    indented,
    name_of,
    place_of,
    stores_at,
    target_of,
)
from pipeline.console import Answer, in_bytes
from stages.progress import Progress


def run(source: str, target: str, progress: Progress) -> Answer:
    """Copy a store, or every store of a folder; what is there already is not sent again.

    Args:
        source: A store, or a folder of stores; or the URL of either.
        target: The folder or URL they are copied into, each under its own name.
        progress: Told of the bytes.
    """
    destination = place_of(target)

    def copy(store: Where) -> Outcome:
        goes_to = target_of(destination, name_of(store))
        with bar_of_bytes(progress, "copy", store) as task:
            report = copy_store(store, goes_to, advance=task.advance)
        there = f", {report.num_present} there already" if report.num_present else ""
        rows = [
            ("to", report.store),
            ("clips", f"{report.num_clips} in {counted(report.num_shards, 'shard')}"),
            ("files", f"{report.num_sent} sent, {in_bytes(report.num_bytes_sent)}{there}"),
        ]
        data = {
            "target": report.store,
            "shards": report.num_shards,
            "clips": report.num_clips,
            "files_sent": report.num_sent,
            "bytes_sent": report.num_bytes_sent,
            "files_already_there": report.num_present,
        }
        return Outcome(rows=indented(rows), data=data)

    return each_store(
        stores_at(place_of(source)),
        copy,
        title=lambda found: f"copied {counted(len(found), 'store')} to {destination}",
    )
