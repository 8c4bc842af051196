"""`cache repair`: what is damaged set aside, what is intact kept."""

from __future__ import annotations

from pathlib import Path

from cache_schema.maintenance.repair import RepairReport, repair_store
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
    counted,
    each_store,
    indented,
    list_failures_again,
    stores_at,
)
from pipeline.console import Answer
from stages.progress import Progress

_AGAIN = (
    "what was taken out is made again by extract-features --retry-failed, with the configuration "
    "the store was made with"
)


def run(cache: Path, progress: Progress) -> Answer:
    """Repair a store, or every store of a folder; the exit code is 1 where something is left."""
    stores = stores_at(cache)
    lacking = False

    def repair(store: Where) -> Outcome:
        nonlocal lacking
        with bar_of_bytes(progress, "repair", store) as task:
            report = repair_store(Path(store), advance=task.advance)
        lacking |= bool(report.clips or report.shards)
        return _told(store, report)

    answer = each_store(
        stores,
        repair,
        title=lambda found: (
            f"{sum(one.data.get('damaged', True) for one in found)} of "
            f"{counted(len(found), 'store')} needed repair: {cache}"
        ),
    )
    if lacking:
        answer.notes.append(_AGAIN)
    list_failures_again(stores, progress)
    return answer


def _told(store: Where, report: RepairReport) -> Outcome:
    left = [problem for problem in report.left if not is_harmless(problem)]
    still = f"; {len(left)} left" if left else ""
    rows = [("problems", counted_problems(report.found) + still)]
    taken = [counted(len(report.clips), "clip")] if report.clips else []
    taken += [counted(len(report.shards), "whole shard")] if report.shards else []
    if taken:
        rows.append(("taken out", " and ".join(taken)))
    if report.quarantine is not None:
        rows.append(("quarantine", str(report.quarantine)))
    data = {
        "damaged": not all(map(is_harmless, report.found)),
        "found": problem_data(report.found),
        "left": problem_data(report.left),
        "quarantine": None if report.quarantine is None else str(report.quarantine),
        "clips": [
            {"key": clip.key, "shard": clip.shard, "reason": clip.reason, "detail": clip.detail}
            for clip in report.clips
        ],
        "shards": list(report.shards),
    }
    notes = problem_notes(store, [one for one in report.found if one not in report.left])
    notes += [f"left: {line}" for line in problem_notes(store, report.left)]
    return Outcome(rows=indented(rows), data=data, notes=notes, failed=bool(left))
