"""`cache repair`: quarantine what is damaged, keep what is intact."""

from __future__ import annotations

from pathlib import Path

from cache_schema.maintenance.repair import RepairReport, repair_store
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    bytes_bar,
    indented,
    pluralize,
    run_on_each_store,
    stores_at,
    update_failures_file,
)
from pipeline.commands.maintenance.verify import (
    counted_problems,
    is_harmless,
    problem_data,
    problem_notes,
)
from pipeline.console import CommandResult
from stages.progress import Progress

_RECOMPUTE = (
    "extract-features --retry-failed recomputes what was removed; run it with the configuration "
    "the store was made with"
)


def run(cache: Path, progress: Progress) -> CommandResult:
    """Repair a store, or every store of a folder; the exit code is 1 if problems remain."""
    stores = stores_at(cache)
    any_removed = False

    def repair(store: PathOrUrl) -> Outcome:
        nonlocal any_removed
        with bytes_bar(progress, "repair", store) as task:
            report = repair_store(Path(store), advance=task.advance)
        any_removed |= bool(report.clips or report.shards)
        return _outcome(store, report)

    result = run_on_each_store(
        stores,
        repair,
        title=lambda found: (
            f"{sum(one.data.get('damaged', True) for one in found)} of "
            f"{pluralize(len(found), 'store')} needed repair: {cache}"
        ),
    )
    if any_removed:
        result.notes.append(_RECOMPUTE)
    update_failures_file(stores, progress)
    return result


def _outcome(store: PathOrUrl, report: RepairReport) -> Outcome:
    remaining = [problem for problem in report.remaining if not is_harmless(problem)]
    not_repaired = f"; {len(remaining)} not repaired" if remaining else ""
    rows = [("problems", counted_problems(report.found) + not_repaired)]
    removed = [pluralize(len(report.clips), "clip")] if report.clips else []
    removed += [pluralize(len(report.shards), "whole shard")] if report.shards else []
    if removed:
        rows.append(("removed", " and ".join(removed)))
    if report.quarantine is not None:
        rows.append(("quarantine", str(report.quarantine)))
    data = {
        "damaged": not all(map(is_harmless, report.found)),
        "found": problem_data(report.found),
        "left": problem_data(report.remaining),
        "quarantine": None if report.quarantine is None else str(report.quarantine),
        "clips": [
            {"key": clip.key, "shard": clip.shard, "reason": clip.reason, "detail": clip.detail}
            for clip in report.clips
        ],
        "shards": list(report.shards),
    }
    notes = problem_notes(store, [one for one in report.found if one not in report.remaining])
    notes += [f"not repaired: {line}" for line in problem_notes(store, report.remaining)]
    return Outcome(rows=indented(rows), data=data, notes=notes, failed=bool(remaining))
