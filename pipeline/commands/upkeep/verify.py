"""`cache verify`: is every committed byte what it was."""

from __future__ import annotations

from collections.abc import Sequence

from cache_schema.upkeep.verify import VerifyReport, verify_store
from pipeline.commands.upkeep.problem_notes import (
    is_harmless,
    problem_data,
    problem_notes,
    remedy_notes,
)
from pipeline.commands.upkeep.stores import (
    Outcome,
    Where,
    bar_of_bytes,
    counted,
    each_store,
    indented,
    place_of,
    stores_at,
)
from pipeline.console import Answer, in_bytes
from stages.progress import Progress


def run(where: str, progress: Progress, *, fast: bool = False) -> Answer:
    """Check the store at a folder or URL, or every store in it.

    Args:
        where: A store or a folder of stores, or the URL of either.
        progress: Told of the bytes.
        fast: Compare listings and sizes, and read no clip.
    """
    cache = place_of(where)

    def check(store: Where) -> Outcome:
        with bar_of_bytes(progress, "verify", store) as task:
            report = verify_store(store, fast=fast, advance=task.advance)
        return _told(store, report, fast=fast)

    return each_store(stores_at(cache), check, title=lambda found: _title(found, cache))


def _title(found: Sequence[Outcome], cache: Where) -> str:
    bad = sum(outcome.failed for outcome in found)
    return (
        f"{bad} of {counted(len(found), 'store')} not intact: {cache}"
        if bad
        else (f"intact: {cache}")
    )


def _told(store: Where, report: VerifyReport, *, fast: bool) -> Outcome:
    problems = [one for one in report.problems if not is_harmless(one)]
    leftovers = len(report.problems) - len(problems)
    how = "listings and sizes compared" if fast else "every checksum compared"
    harmless = f", and {counted(leftovers, 'harmless leftover')}" if leftovers else ""
    rows = [
        ("clips", f"{report.num_clips}, {in_bytes(report.num_bytes)}; {how}"),
        ("problems", f"{len(problems) or 'none'}{harmless}"),
    ]
    data = {
        "clips": report.num_clips,
        "bytes": report.num_bytes,
        "fast": fast,
        "intact": not problems,
        "problems": problem_data(report.problems),
    }
    return Outcome(
        rows=indented(rows),
        data=data,
        notes=problem_notes(store, report.problems) + remedy_notes(store, report.problems),
        failed=bool(problems),
    )
