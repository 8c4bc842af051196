"""`cache verify`: check every committed byte against its checksum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache_schema import CorruptRecord
from cache_schema.maintenance.verify import Problem, VerifyReport, verify_store
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
)
from pipeline.console import CommandResult, format_bytes
from pipeline.failures import remedy_text
from stages.progress import Progress

_MAX_NOTES = 20


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


def is_harmless(problem: Problem) -> bool:
    """Whether readers are unaffected and the next extraction cleans it up."""
    return problem.remedy == "extract"


def counted_problems(problems: Sequence[Problem]) -> str:
    """Count problems and harmless leftovers: 2, and 1 harmless leftover."""
    harmless = sum(map(is_harmless, problems))
    rest = f", and {pluralize(harmless, 'harmless leftover')}" if harmless else ""
    return f"{len(problems) - harmless or 'none'}{rest}"


def problem_notes(store: PathOrUrl, problems: Sequence[Problem]) -> list[str]:
    """A line for each problem, up to a limit."""
    notes = [_describe(store, one) for one in problems[:_MAX_NOTES]]
    if len(problems) > _MAX_NOTES:
        more = f"… and {len(problems) - _MAX_NOTES} more; --json lists them"
        notes.append(f"{store_name(store)} {more}")
    return notes


def problem_data(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as JSON values."""
    return [
        {"shard": one.shard, "key": one.key, "what": one.what, "mend": one.remedy}
        for one in problems
    ]


def _describe(store: PathOrUrl, problem: Problem) -> str:
    clip = f" clip {problem.key!r}" if problem.key is not None else ""
    shard = f" shard {problem.shard}" if problem.shard is not None else ""
    # The other remedies are printed once for all problems.
    once = problem.remedy in ("repair", "copy")
    remedy = "" if once else f"; {remedy_text(problem.remedy)}"
    return f"{store_name(store)}{shard}{clip}: {problem.what}{remedy}"
