"""`cache migrate`: stores of an older schema version, brought to this one."""

from __future__ import annotations

from pathlib import Path

from cache_schema import SCHEMA_VERSION
from cache_schema.upkeep.migrate import migrate_store
from pipeline.commands.upkeep.stores import Outcome, Where, each_store, indented, stores_at
from pipeline.console import Answer
from stages.progress import Progress


def run(cache: Path, progress: Progress) -> Answer:
    """Migrate a store, or every store of a folder; one that needs nothing stays as it is."""
    stores = stores_at(cache)
    with progress.task("migrate", len(stores), unit="stores") as task:

        def migrate(store: Where) -> Outcome:
            report = migrate_store(Path(store))
            task.advance()
            done = f"{report.num_records} rewritten" if report.num_records else "nothing to do"
            return Outcome(
                rows=indented([("records", done), ("clips", str(report.num_clips))]),
                data={"records_rewritten": report.num_records, "clips": report.num_clips},
            )

        return each_store(
            stores, migrate, title=lambda _: f"schema version {SCHEMA_VERSION}: {cache}"
        )
