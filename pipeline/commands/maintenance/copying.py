"""`cache copy`: copy stores to another disk or an object store."""

from __future__ import annotations

from cache_schema.maintenance.copy import copy_store
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    bytes_bar,
    indented,
    path_or_url,
    pluralize,
    run_on_each_store,
    store_name,
    stores_at,
    target_store,
)
from pipeline.console import CommandResult, format_bytes, json_values
from stages.progress import Progress


def run(source: str, target: str, progress: Progress) -> CommandResult:
    """Copy a store, or every store of a folder; files that exist at the target are not sent again.

    Args:
        source: A store or a folder of stores, or the URL of either.
        target: The folder or URL to copy into; each store keeps its name.
        progress: Advanced by bytes.
    """
    destination = path_or_url(target)

    def copy(store: PathOrUrl) -> Outcome:
        store_target = target_store(destination, store_name(store))
        with bytes_bar(progress, "copy", store) as task:
            report = copy_store(store, store_target, advance=task.advance)
        present = f", {report.num_present} already there" if report.num_present else ""
        rows = [
            ("to", report.store),
            ("clips", f"{report.num_clips} in {pluralize(report.num_shards, 'shard')}"),
            ("files", f"{report.num_sent} sent, {format_bytes(report.num_bytes_sent)}{present}"),
        ]
        data = json_values(
            report,
            target="store",
            files_sent="num_sent",
            bytes_sent="num_bytes_sent",
            files_already_there="num_present",
        )
        return Outcome(rows=indented(rows), data=data)

    return run_on_each_store(
        stores_at(path_or_url(source)),
        copy,
        title=lambda found: f"copied {pluralize(len(found), 'store')} to {destination}",
    )
