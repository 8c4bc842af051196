"""`cache verify`: check every committed byte against its checksum."""

from __future__ import annotations

from collections.abc import Sequence

from cache_schema import CorruptRecord
from cache_schema.maintenance.verify import Problem, VerifyReport, verify_store
from pipeline.commands.maintenance.problem_notes import (
    counted_problems,
    is_harmless,
    problem_data,
    problem_notes,
)
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    bytes_bar,
    indented,
    path_or_url,
    pluralize,
    run_on_each_store,
    stores_at,
)
from pipeline.console import CommandResult, format_bytes
from pipeline.failures import remedy_text
from stages.progress import Progress


def run(location: str, progress: Progress, *, fast: bool = False) -> CommandResult:
    """Check the store at a folder or URL, or every store in it.

    Args:
        location: A store or a folder of stores, or the URL of either.
        progress: Advanced by bytes.
        fast: Compare file listings and sizes only; read no clip.
    """
    cache = path_or_url(location)

    def check(store: PathOrUrl) -> Outcome:
        with bytes_bar(progress, "verify", store) as task:
            try:
                report = verify_store(store, fast=fast, advance=task.advance)
            except CorruptRecord as error:  # the store's own record, not a shard's
                report = VerifyReport((Problem(None, None, str(error), "repair"),), 0, 0)
        return _outcome(store, report, fast=fast)

    result = run_on_each_store(stores_at(cache), check, title=lambda found: _title(found, cache))
    problems = [one for store in result.data["stores"] for one in store.get("problems", [])]
    mends = {one["mend"] for one in problems}
    if "repair" in mends:
        result.notes.append(
            f"{remedy_text('repair', str(cache))} with the configuration the stores were made with"
        )
    if "copy" in mends:
        result.notes.append(remedy_text("copy"))
    return result


def _title(found: Sequence[Outcome], cache: PathOrUrl) -> str:
    bad = sum(outcome.failed for outcome in found)
    return (
        f"{bad} of {pluralize(len(found), 'store')} not intact: {cache}"
        if bad
        else (f"intact: {cache}")
    )


def _outcome(store: PathOrUrl, report: VerifyReport, *, fast: bool) -> Outcome:
    intact = all(map(is_harmless, report.problems))
    how = "listings and sizes compared" if fast else "every checksum compared"
    rows = [
        ("clips", f"{report.num_clips}, {format_bytes(report.num_bytes)}; {how}"),
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
