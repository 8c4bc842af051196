"""Which runs to make next, given the results that are there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.evidence.arms import ARMS, Arm, Group
from tests.benchmarks.evidence.estimates import structure_errors
from tests.benchmarks.evidence.runs import BASE, RECONSTRUCTION, Run
from tests.benchmarks.evidence.sizes import Size

TUNING_SEED = 100
"""Training seed of the runs that choose the weights; no run of the comparison has it."""

Rows = Mapping[str, Mapping[str, Any]]


def arms_of(size: Size, names: Sequence[str] = ()) -> list[Arm]:
    """The arms to run, of those that `names` lists if it lists any.

    Raises:
        ValueError: There is no such arm.
    """
    known = {arm.name: arm for arm in ARMS if size.arms is None or arm.name in size.arms}
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(f"no arm {', '.join(unknown)}; there are {', '.join(known)}")
    return [
        arm
        for arm in known.values()
        if (not names or arm.name in names) and size.steps_of(arm.group)
    ]


def next_runs(size: Size, arms: Sequence[Arm], rows: Rows) -> list[Run]:
    """The runs of the first phase that has any left; all of them may be made at once.

    The base model comes first, then the weights are chosen, then the comparison follows seed by
    seed, so that a stopped one has all arms with fewer seeds.
    """
    for phase in _phases(size, arms, rows):
        if missing := [run for run in phase if run.name not in rows]:
            return missing
    return []


def _phases(size: Size, arms: Sequence[Arm], rows: Rows) -> list[list[Run]]:
    base = [Run(arm=BASE), *([Run(arm=BASE, part="tuning")] if _tunes(size) else [])]
    tuning = [
        Run(arm=arm, seed=TUNING_SEED, weight=weight, part="tuning", steps=size.steps)
        for arm in {one.name: one for one in map(_tuned_arm, arms) if one.weight}.values()
        for weight in size.tuning_weights
        if _tunes(size)
    ]
    phases = [base, [Run(arm=RECONSTRUCTION)], tuning]
    if any(run.name not in rows for run in [*base, *tuning]):
        return phases
    order: list[tuple[tuple[Group, ...], tuple[int, ...]]] = [
        (("main", "control"), size.seeds),
        (("projector", "open"), size.few_seeds),
        (("full",), size.few_seeds),
        (("scratch",), size.few_seeds),
    ]
    for groups, seeds in order:
        for seed in seeds:
            of_groups = [arm for arm in arms if arm.group in groups]
            phases.append([run for arm in of_groups for run in _runs_of(arm, seed, size, rows)])
    return phases


def _runs_of(arm: Arm, seed: int, size: Size, rows: Rows) -> list[Run]:
    weight = chosen_weight(arm, size, rows)
    runs = [
        Run(arm=arm, seed=seed, weight=weight, steps=steps) for steps in size.steps_of(arm.group)
    ]
    if arm.group != "scratch":
        return runs
    # A run is scored after so many steps and then goes on, so the next score waits for this one.
    return next(([run] for run in runs if run.name not in rows), [])


def chosen_weight(arm: Arm, size: Size, rows: Rows) -> float | None:
    """The weight of an arm's auxiliary loss: that of the least structure error on tuning clips."""
    tuned = _tuned_arm(arm)
    if tuned.weight is None:
        return None
    if not _tunes(size):
        return size.tuning_weights[0]
    base = rows[Run(arm=BASE, part="tuning").name]

    def error(weight: float) -> float:
        run = Run(arm=tuned, seed=TUNING_SEED, weight=weight, part="tuning", steps=size.steps)
        found = structure_errors([rows[run.name]], base)
        return math.inf if math.isnan(found) else found

    return min(size.tuning_weights, key=error)


def _tunes(size: Size) -> bool:
    return len(size.tuning_weights) > 1


def _tuned_arm(arm: Arm) -> Arm:
    """The arm whose tuning an arm uses."""
    return next((one for one in ARMS if one.name == arm.weight_of), arm)


def rows_of_arm(rows: Rows, arm: str, *, steps: int) -> list[Mapping[str, Any]]:
    """The results of an arm on the test clips, by training seed."""
    found = [
        row
        for row in rows.values()
        if row["arm"] == arm and row["part"] == "test" and row["steps"] == steps
    ]
    return sorted(found, key=lambda row: row["seed"])


def base_row(rows: Rows) -> Mapping[str, Any]:
    """The base model's result on the test clips."""
    return rows[Run(arm=BASE).name]
