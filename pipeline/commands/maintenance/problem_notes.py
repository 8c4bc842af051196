"""Problems found by `cache verify` and `cache repair`, as printed lines and JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache_schema.maintenance.verify import Problem
from pipeline.commands.maintenance.stores import PathOrUrl, pluralize, store_name
from pipeline.failures import remedy_text

_MAX_NOTES = 20


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
