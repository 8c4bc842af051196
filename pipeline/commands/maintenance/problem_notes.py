"""What `cache verify` and `cache repair` print of what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache_schema.maintenance.verify import MENDS, Problem
from pipeline.commands.maintenance.stores import Where, counted, name_of

_SHOWN = 20


def is_harmless(problem: Problem) -> bool:
    """Whether readers are not concerned, and the next extraction clears it up."""
    return problem.mend == "extract"


def counted_problems(problems: Sequence[Problem]) -> str:
    """Write how many there are: 2, and 1 harmless leftover."""
    harmless = sum(map(is_harmless, problems))
    rest = f", and {counted(harmless, 'harmless leftover')}" if harmless else ""
    return f"{len(problems) - harmless or 'none'}{rest}"


def problem_notes(store: Where, problems: Sequence[Problem]) -> list[str]:
    """A line for each problem; of many, the first ones."""
    notes = [_told(store, one) for one in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        more = f"… and {len(problems) - _SHOWN} more; --json lists them"
        notes.append(f"{name_of(store)} {more}")
    return notes


def problem_data(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as JSON values."""
    return [
        {"shard": one.shard, "key": one.key, "what": one.what, "mend": one.mend} for one in problems
    ]


def _told(store: Where, problem: Problem) -> str:
    clip = f" clip {problem.key!r}" if problem.key is not None else ""
    shard = f" shard {problem.shard}" if problem.shard is not None else ""
    # The other remedies are one command for all.
    remedy = f"; {MENDS[problem.mend]}" if problem.mend in ("extract", "by hand") else ""
    return f"{name_of(store)}{shard}{clip}: {problem.what}{remedy}"
