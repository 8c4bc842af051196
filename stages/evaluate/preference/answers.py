"""People's answers to a preference page: win rates, strengths, agreement, careless answers."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from stages.evaluate.compare import Mean, mean_of
from stages.evaluate.preference.questions import Key
from stages.files.text import read_object

Choice = Literal["left", "right", "tie"]

_MIN_SECONDS = 1.5
"""Median time per answer below which nobody can have watched the videos."""
_MAX_SHARE_OF_SIDE = 0.9
"""Share of left, or of right, from which answers look as if one key was held."""
_MIN_ANSWERS = 10
"""Fewest answers for judging the share of a side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The answers of one person."""

    rater: str
    choices: Mapping[str, Choice]
    """By question id; not every question need be answered."""
    seconds: Mapping[str, float]
    """Time from showing a question to its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """How often one model is preferred to another."""

    first: str
    second: str
    rate: Mean
    """Share of answers for the first, ties counted half; averaged over prompts."""
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """What all answers together say."""

    raters: tuple[str, ...]
    win_rates: tuple[WinRate, ...]
    strengths: Mapping[str, float]
    """Bradley-Terry strengths by model, best first, with geometric mean 1; empty for two models."""
    agreement: float | None
    """Krippendorff's alpha (nominal): 1 all agree, 0 as by chance; None if it is undefined."""
    careless: Mapping[str, tuple[str, ...]]
    """Why a person's answers look careless, by name; they are counted all the same."""


def read_sheet(path: Path, key: Key) -> Sheet:
    """Read one person's file of answers.

    Raises:
        ValueError: It is no such file, damaged, or belongs to another page.
    """
    content = read_object(path, page=str, rater=str, answers=dict)
    if content["page"] != key.page:
        raise ValueError(f"{path} answers another page than the key's")
    choices: dict[str, Choice] = {}
    seconds: dict[str, float] = {}
    for question, answer in content["answers"].items():
        match answer:
            case {"choice": "left" | "right" | "tie" as choice, "seconds": int() | float() as time}:
                valid = question in key.questions and 0 <= time < math.inf
            case _:
                valid = False
        if not valid:
            raise ValueError(f"{path} is damaged: the answer to {question!r:.20} is {answer!r:.80}")
        choices[question], seconds[question] = choice, float(time)
    if not choices:
        raise ValueError(f"{path} holds no answers")
    return Sheet(rater=content["rater"] or path.stem, choices=choices, seconds=seconds)


def evaluate_answers(key: Key, sheets: Sequence[Sheet], *, seed: int) -> Preference:
    """Evaluate the answers of one or more people.

    Args:
        key: Which video is whose.
        sheets: One per person.
        seed: Seed of the bootstrap intervals.

    Raises:
        ValueError: Two sheets have the same name.
    """
    raters = [sheet.rater for sheet in sheets]
    if twice := [name for name, count in Counter(raters).items() if count > 1]:
        raise ValueError(f"two files hold answers of {twice[0]!r}; keep one of them")
    win_rates = tuple(
        _win_rate(key, sheets, first, second, seed=seed)
        for first, second in combinations(key.models, 2)
    )
    return Preference(
        raters=tuple(raters),
        win_rates=win_rates,
        strengths=_strengths(key.models, win_rates) if len(key.models) > 2 else {},
        agreement=_agreement(key, sheets),
        careless={sheet.rater: reasons for sheet in sheets if (reasons := _careless(key, sheet))},
    )


def _win_rate(key: Key, sheets: Sequence[Sheet], first: str, second: str, *, seed: int) -> WinRate:
    """The answers to the questions of two models; prompts are independent, people are not."""
    values, prompts = [], []
    for sheet in sheets:
        for name, choice in sheet.choices.items():
            question = key.questions[name]
            if question.check is not None or {question.left, question.right} != {first, second}:
                continue
            chosen = None if choice == "tie" else getattr(question, choice)
            values.append(0.5 if chosen is None else float(chosen == first))
            prompts.append(question.prompt)
    return WinRate(
        first=first,
        second=second,
        rate=mean_of(values, seed=seed, prompts=prompts),
        wins=values.count(1.0),
        losses=values.count(0.0),
        ties=values.count(0.5),
    )


def _strengths(models: Sequence[str], win_rates: Sequence[WinRate]) -> dict[str, float]:
    """Bradley-Terry strengths by Hunter's MM iteration (2004), ties as half a win for each.

    One more tie between every two models keeps strengths finite if one of them always wins.
    """
    number = {name: index for index, name in enumerate(models)}
    wins_MM = 0.5 * (1 - np.eye(len(models)))
    for one in win_rates:
        first, second = number[one.first], number[one.second]
        wins_MM[first, second] += one.wins + one.ties / 2
        wins_MM[second, first] += one.losses + one.ties / 2
    games_MM = wins_MM + wins_MM.T
    strengths_M = np.ones(len(models))
    for _ in range(10_000):
        before_M = strengths_M
        sums_MM = strengths_M[:, None] + strengths_M
        strengths_M = wins_MM.sum(axis=1) / (games_MM / sums_MM).sum(axis=1)
        strengths_M /= np.exp(np.log(strengths_M).mean())
        if np.abs(strengths_M / before_M - 1).max() < 1e-12:
            break
    found = dict(zip(models, strengths_M.tolist(), strict=True))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _agreement(key: Key, sheets: Sequence[Sheet]) -> float | None:
    answers: dict[str, list[str]] = defaultdict(list)
    for sheet in sheets:
        for name, choice in sheet.choices.items():
            if key.questions[name].check is None:
                answers[name].append(choice)
    return nominal_alpha(list(answers.values()))


def nominal_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha of the values that several people gave to each unit.

    Source: Krippendorff (2011), "Computing Krippendorff's alpha-reliability".

    Returns:
        1 if all agree, 0 as by chance, below 0 if less; None if no unit has two values, or all
        values are equal, which says nothing.
    """
    shared = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(shared, Counter())
    count = totals.total()
    if len(totals) < 2:
        return None
    observed = sum(
        (unit.total() ** 2 - sum(n**2 for n in unit.values())) / (unit.total() - 1)
        for unit in shared
    )
    expected = (count**2 - sum(n**2 for n in totals.values())) / (count - 1)
    return 1 - observed / expected


def _careless(key: Key, sheet: Sheet) -> tuple[str, ...]:
    checks = {name: choice for name, choice in sheet.choices.items() if key.questions[name].check}
    missed = sum(key.questions[name].check != choice for name, choice in checks.items())
    reasons = []
    if missed:
        reasons.append(f"{missed} of {len(checks)} attention checks missed")
    median = statistics.median(sheet.seconds.values())
    if median < _MIN_SECONDS:
        reasons.append(f"{median:.1f} s per answer")
    counts = Counter(sheet.choices.values())
    for side in ("left", "right"):
        share = counts[side] / len(sheet.choices)
        if len(sheet.choices) >= _MIN_ANSWERS and share >= _MAX_SHARE_OF_SIDE:
            reasons.append(f"{share:.0%} of the answers are {side}")
    return tuple(reasons)
