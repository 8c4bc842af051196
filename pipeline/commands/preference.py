"""`preference`: a page for the blind comparison of videos, and what people answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.load import ConfigError
from pipeline.console import CommandResult, json_values

if TYPE_CHECKING:
    from stages.evaluate.preference.answers import Preference


def make(folders: Sequence[Path], out: Path, *, checks: int, seed: int) -> CommandResult:
    """Write the page, its videos and its key.

    Args:
        folders: Two or more folders of videos, one per model, which their names stand for.
        out: Folder of the page; must be empty or new.
        checks: Number of attention checks.
        seed: Decides order, places and checks.

    Raises:
        ConfigError: Two folders have the same name.
        ValueError: The folders hold no pairs, or videos that browsers cannot play.
    """
    from stages.evaluate.preference.questions import KEY_FILE, PAGE_FILE, write_preference
    from stages.evaluate.videos import open_side

    names = [folder.resolve().name for folder in folders]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"name two or more folders with different names, got {', '.join(names)}")
    sides = [open_side(name, folder) for name, folder in zip(names, folders, strict=True)]
    questions = write_preference(sides, out, checks=checks, seed=seed)
    num_checks = sum(question.check is not None for question in questions)
    page, key = str(out / PAGE_FILE), str(out / KEY_FILE)
    return CommandResult(
        title="preference page",
        rows=[
            ("models", ", ".join(names)),
            ("questions", f"{len(questions)}, {num_checks} of them attention checks"),
            ("to be given to people", f"{page}, with the folder of videos beside it"),
            ("to be kept", key),
        ],
        data={"page": page, "key": key, "questions": len(questions), "checks": num_checks},
        notes=[page],
    )


def read(key_file: Path, files: Sequence[Path], *, seed: int) -> CommandResult:
    """Evaluate people's answers.

    Args:
        key_file: The page's key.json.
        files: One file of answers per person.
        seed: Seed of the bootstrap intervals.

    Raises:
        ValueError: A file is damaged or belongs to another page, or two are of one person.
    """
    from stages.evaluate.preference.answers import evaluate_answers, read_sheet
    from stages.evaluate.preference.questions import read_key

    key = read_key(key_file)
    found = evaluate_answers(key, [read_sheet(file, key) for file in files], seed=seed)
    return CommandResult(
        title="preference",
        rows=_rows(found),
        data=json_values(found),
        notes=[
            f"{rater} looks careless: {', '.join(reasons)}"
            for rater, reasons in found.careless.items()
        ],
    )


def _rows(found: Preference) -> list[tuple[str, str]]:
    rows = [("people", f"{len(found.raters)}: {', '.join(found.raters)}")]
    for one in found.win_rates:
        counts = f"{one.wins} won, {one.losses} lost, {one.ties} ties"
        rows.append((f"{one.first} against {one.second}", f"{one.rate.text}; {counts}"))
    for name, strength in found.strengths.items():
        rows.append((f"strength of {name}", f"{strength:.3g}"))
    agreement = (
        "not measurable: no question has different answers, or only one person answered"
        if found.agreement is None
        else f"{found.agreement:.2f} (Krippendorff's alpha; 1 all agree, 0 as by chance)"
    )
    return [*rows, ("agreement", agreement)]
