"""`cache merge`: stores of several machines in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from cache_schema import StoreReader, StoreSettings, list_stores
from cache_schema.maintenance.merge import merge_stores
from cache_schema.schema import differing_settings
from pipeline.commands.maintenance.stores import (
    Outcome,
    Where,
    bar_of_bytes,
    counted,
    each_store,
    indented,
    list_failures_again,
    stores_at,
    target_of,
)
from pipeline.console import Answer, in_bytes
from stages.progress import Progress


def run(
    target: Path, sources: Sequence[Path], progress: Progress, *, prefix: str | None = None
) -> Answer:
    """Bring the shards of all sources into the stores of the same settings in `target`.

    Args:
        target: A store, or a folder of stores; made where there is none.
        sources: Stores, and folders of stores.
        progress: Told of the bytes.
        prefix: Put before the names of the shards that are brought in.
    """
    settings = {
        Path(store): StoreReader(store).settings
        for source in sources
        for store in stores_at(source)
    }
    into: dict[Where, list[Path]] = {}
    for store, its_settings in settings.items():
        into.setdefault(target_of(target, its_settings.folder_name), []).append(store)

    def merge(store: Where) -> Outcome:
        with bar_of_bytes(progress, "merge", *into[store]) as task:
            report = merge_stores(Path(store), into[store], prefix=prefix, advance=task.advance)
        there = f", {report.num_present} there already" if report.num_present else ""
        linked = f", {in_bytes(report.num_linked_bytes)} of it shared with the sources"
        rows = [
            ("from", ", ".join(map(str, into[store]))),
            ("shards", f"{len(report.shards)} brought in{there}"),
            ("clips", f"{report.num_clips}, {in_bytes(report.num_bytes)}"),
        ]
        if report.num_linked_bytes:
            rows[-1] = (rows[-1][0], rows[-1][1] + linked)
        data = {
            "sources": [str(source) for source in into[store]],
            "shards": list(report.shards),
            "shards_already_there": report.num_present,
            "clips": report.num_clips,
            "bytes": report.num_bytes,
            "linked_bytes": report.num_linked_bytes,
        }
        return Outcome(rows=indented(rows), data=data)

    answer = each_store(
        list(into),
        merge,
        title=lambda found: f"merged into {counted(len(found), 'store')}: {target}",
    )
    answer.notes.extend(_unlike(into, settings))
    list_failures_again(into, progress)
    return answer


def _unlike(into: Iterable[Where], settings: dict[Path, StoreSettings]) -> list[str]:
    """Say where stores of one kind stay apart, since a run takes one of them."""
    named = {its.folder_name: its for its in settings.values()}
    for folder in {Path(store).parent for store in into}:
        for store in list_stores(folder):
            named.setdefault(Path(store).name, StoreReader(store).settings)
    merged = {its.folder_name for its in settings.values()}
    return [
        f"{first} and {second} stay two stores, since they differ in "
        f"{_differences(named[first], named[second])}; train.stores.{named[first].kind} says which "
        "one a run takes"
        for first, second in combinations(sorted(named), 2)
        if named[first].kind == named[second].kind and merged & {first, second}
    ]


def _differences(first: StoreSettings, second: StoreSettings) -> str:
    """The settings that differ, each array once."""
    names = [name.split(".") for name in differing_settings(first, second)]
    return ", ".join(dict.fromkeys(".".join(parts[:2]) for parts in names))
