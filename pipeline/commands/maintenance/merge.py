"""`cache merge`: merge stores of several machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from cache_schema import StoreReader, StoreSettings, list_stores
from cache_schema.maintenance.merge import merge_stores
from cache_schema.schema import differing_settings
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    bytes_bar,
    indented,
    pluralize,
    run_on_each_store,
    stores_at,
    target_store,
    update_failures_file,
)
from pipeline.console import CommandResult, format_bytes, json_values
from stages.progress import Progress


def run(
    target: Path, sources: Sequence[Path], progress: Progress, *, prefix: str | None = None
) -> CommandResult:
    """Add the shards of all sources to the stores with the same settings in `target`.

    Args:
        target: A store, or a folder of stores; created if missing.
        sources: Stores, or folders of stores.
        progress: Advanced by bytes.
        prefix: Prepended to the names of the incoming shards.
    """
    settings = {
        Path(store): StoreReader(store).settings
        for source in sources
        for store in stores_at(source)
    }
    into: dict[PathOrUrl, list[Path]] = {}
    for store, store_settings in settings.items():
        into.setdefault(target_store(target, store_settings.folder_name), []).append(store)

    def merge(store: PathOrUrl) -> Outcome:
        with bytes_bar(progress, "merge", *into[store]) as task:
            report = merge_stores(Path(store), into[store], prefix=prefix, advance=task.advance)
        present = f", {report.num_present} already there" if report.num_present else ""
        linked = f", {format_bytes(report.num_linked_bytes)} of it hard-linked to the sources"
        size = format_bytes(report.num_bytes) + (linked if report.num_linked_bytes else "")
        rows = [
            ("from", ", ".join(map(str, into[store]))),
            ("shards", f"{len(report.shards)} added{present}"),
            ("clips", f"{report.num_clips}, {size}"),
        ]
        data = {
            "sources": [str(source) for source in into[store]],
            **json_values(report, leave_out=("store",), shards_already_there="num_present"),
        }
        return Outcome(rows=indented(rows), data=data)

    result = run_on_each_store(
        list(into),
        merge,
        title=lambda found: f"merged into {pluralize(len(found), 'store')}: {target}",
    )
    result.notes.extend(_stores_kept_apart(into, settings))
    update_failures_file(into, progress)
    return result


def _stores_kept_apart(into: Iterable[PathOrUrl], settings: dict[Path, StoreSettings]) -> list[str]:
    """Notes on stores of one kind that were not merged; a training run reads one of them."""
    named = {store.folder_name: store for store in settings.values()}
    for folder in {Path(store).parent for store in into}:
        for store in list_stores(folder):
            named.setdefault(Path(store).name, StoreReader(store).settings)
    merged = {store.folder_name for store in settings.values()}
    return [
        f"{first} and {second} remain separate stores, since they differ in "
        f"{_differences(named[first], named[second])}; set train.stores.{named[first].kind} to the "
        "one a run should read"
        for first, second in combinations(sorted(named), 2)
        if named[first].kind == named[second].kind and merged & {first, second}
    ]


def _differences(first: StoreSettings, second: StoreSettings) -> str:
    """Names of the settings that differ, each array once."""
    names = [name.split(".") for name in differing_settings(first, second)]
    return ", ".join(dict.fromkeys(".".join(parts[:2]) for parts in names))
