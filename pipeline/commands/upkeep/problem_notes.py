"""What `cache verify` and `cache repair` print of what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cache_schema.upkeep.verify import MENDS, Problem
from pipeline.commands.upkeep.stores import Where, name_of

_SHOWN = 20


def is_harmless(problem: Problem) -> bool:
    """Whether readers are not concerned, and the next extraction clears it up."""
    return problem.mend == "extract"


def problem_notes(store: Where, problems: Sequence[Problem]) -> list[str]:
    """A line for each problem; of many, the first ones."""
    notes = [f"{_place(store, one)}: {one.what}" for one in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        more = f"… and {len(problems) - _SHOWN} more; --json lists them"
        notes.append(f"{name_of(store)} {more}")
    return notes


def remedy_notes(store: Where, problems: Sequence[Problem]) -> list[str]:
    """What to do about each sort of problem."""
    return [
        f"{name_of(store)}, {count} of these: {MENDS[mend]}"
        for mend, count in Counter(one.mend for one in problems).most_common()
    ]


def problem_data(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as JSON values."""
    return [
        {"shard": one.shard, "key": one.key, "what": one.what, "mend": one.mend} for one in problems
    ]


def _place(store: Where, problem: Problem) -> str:
    clip = f" clip {problem.key!r}" if problem.key is not None else ""
    shard = f" shard {problem.shard}" if problem.shard is not None else ""
    return f"{name_of(store)}{shard}{clip}"
