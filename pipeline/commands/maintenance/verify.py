"""`cache verify`: is every committed byte what it was."""

from __future__ import annotations

from collections.abc import Sequence

from cache_schema import CorruptRecord
from cache_schema.maintenance.verify import MENDS, Problem, VerifyReport, verify_store
from pipeline.commands.maintenance.problem_notes import (
    counted_problems,
    is_harmless,
    problem_data,
    problem_notes,
)
from pipeline.commands.maintenance.stores import (
    Outcome,
    Where,
    bar_of_bytes,
    command,
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
            try:
                report = verify_store(store, fast=fast, advance=task.advance)
            except CorruptRecord as error:  # of the store itself
                report = VerifyReport((Problem(None, None, str(error), "repair"),), 0, 0)
        return _told(store, report, fast=fast)

    answer = each_store(stores_at(cache), check, title=lambda found: _title(found, cache))
    problems = [one for store in answer.data["stores"] for one in store.get("problems", [])]
    mends = {one["mend"] for one in problems}
    if "repair" in mends:
        answer.notes.append(
            f"run {command('cache', 'repair', cache)}, then extract-features --retry-failed with "
            "the configuration the stores were made with"
        )
    if "copy" in mends:
        answer.notes.append(MENDS["copy"])
    return answer


def _title(found: Sequence[Outcome], cache: Where) -> str:
    bad = sum(outcome.failed for outcome in found)
    return (
        f"{bad} of {counted(len(found), 'store')} not intact: {cache}"
        if bad
        else (f"intact: {cache}")
    )


def _told(store: Where, report: VerifyReport, *, fast: bool) -> Outcome:
    intact = all(map(is_harmless, report.problems))
    how = "listings and sizes compared" if fast else "every checksum compared"
    rows = [
        ("clips", f"{report.num_clips}, {in_bytes(report.num_bytes)}; {how}"),
        ("problems", counted_problems(report.problems)),
    ]
    data = {
        "clips": report.num_clips,
        "bytes": report.num_bytes,
        "fast": fast,
        "intact": intact,
        "problems": problem_data(report.problems),
    }
    return Outcome(
        rows=indented(rows),
        data=data,
        notes=problem_notes(store, report.problems),
        failed=not intact,
    )
