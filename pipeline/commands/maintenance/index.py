"""`cache index`: the files that lists of clips are read from, written from the commit records."""

from __future__ import annotations

from pathlib import Path

from cache_schema import StoreWriter
from cache_schema.names import StoreLayout
from cache_schema.records import read_manifest
from cache_schema.storage import refuse_links
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    indented,
    pluralize,
    run_on_each_store,
    stores_at,
)
from pipeline.console import CommandResult, format_bytes
from stages.progress import Progress


def run(cache: Path, progress: Progress) -> CommandResult:
    """Write `index.npz` and `attributes.npz` of a store, or of every store of a folder."""
    stores = stores_at(cache)
    with progress.task("index", len(stores), unit="stores") as task:

        def write(store: PathOrUrl) -> Outcome:
            layout = StoreLayout(Path(store))
            refuse_links(layout)
            writer = StoreWriter(layout.root, read_manifest(layout).settings)
            writer.write_index()
            writer.write_attributes()
            task.advance()
            sizes = {path.name: path.stat().st_size for path in (layout.index, layout.attributes)}
            rows = [(name, format_bytes(size)) for name, size in sizes.items()]
            return Outcome(rows=indented(rows), data={"bytes": sizes})

        return run_on_each_store(
            stores,
            write,
            title=lambda found: f"indexed {pluralize(len(found), 'store')}: {cache}",
        )
