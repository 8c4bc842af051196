"""The tables and pictures of the comparison, from the rows that are there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from stages.clips import read_video
from tests.benchmarks.evidence.arms import ARM, ARMS, LGF, NONE, Arm, Group
from tests.benchmarks.evidence.data import draw_faster_clip, seeds_of
from tests.benchmarks.evidence.estimates import (
    Estimate,
    Row,
    difference,
    structure_change,
    structure_errors,
    values_SV,
)
from tests.benchmarks.evidence.plan import Rows, base_row, rows_of_arm
from tests.benchmarks.evidence.runs import BASE, RECONSTRUCTION, Run
from tests.benchmarks.evidence.sizes import Size
from tests.benchmarks.report import table

SCORES = (
    "limb_presence",
    "limb_length_error",
    "joint_gap",
    "extra_pieces",
    "side_swaps",
    "flow_divergence",
    "motion_amplitude",
)
_SHEET_CLIPS = 4
"""Clips of the picture: the first ones of the test set, whatever they look like."""
_SHEET_ARMS = (NONE, "repa", "token-relation", "lgf")
_SHEET_FRAMES = (0, 5, 10, 16)
_TITLES: dict[Group, str] = {
    "main": "Fine-tuning: the paper's comparison",
    "control": "Controls: other teachers",
    "projector": "What the projector meets alone",
    "open": "One setting of lgf changed",
    "full": "All weights of the base model",
    "scratch": "From random weights",
}
_REFERENCES: dict[Group, str] = {"open": LGF, "full": "full-none", "scratch": "scratch-none"}
"""Arm that a group's arms are compared with; `none` for the other groups."""


def write_report(out: Path, rows: Rows, size: Size, *, machine: str, name: str) -> Path:
    """Write results.md, results.jsonl, differences.png and videos.jpg to `out`.

    Args:
        out: Folder of the comparison.
        rows: All results.
        size: The lengths that they were made with.
        machine: Where.
        name: Of the size.

    Returns:
        results.md.
    """
    parts = [
        f"# Evidence, size {name}\n",
        f"{len(rows)} runs so far; tables made on {machine}. `README.md` says what is compared, "
        "how and where.\n",
        _bounds(rows),
    ]
    changes: dict[str, Mapping[str, Estimate]] = {}
    for group, title in _TITLES.items():
        for steps in size.steps_of(group):
            after = f", {steps} steps" if group in ("full", "scratch") else ""
            found, of_arms = _table(group, rows, steps)
            if of_arms:
                parts.append(f"## {title}{after}\n\n{found}\n")
                changes[f"{title}{after}, against {_reference(group)}"] = of_arms
    parts.append(_legend())
    if changes:
        _draw_changes(out / "differences.png", changes)
        parts.append("![changes of the structure error](differences.png)\n")
    if _draw_videos(out, rows, size):
        parts.append("![videos of the first test clips, seed 0](videos.jpg)\n")
    lines = "".join(f"{json.dumps(row)}\n" for row in rows.values())
    (out / "results.jsonl").write_text(lines, encoding="utf-8")
    page = out / "results.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _bounds(rows: Rows) -> str:
    """The real clips through the VAE, which no arm can pass, and the base model."""
    names = {
        "real clips, encoded and decoded by the VAE": Run(arm=RECONSTRUCTION).name,
        "base model, before training": Run(arm=BASE).name,
    }
    lines = [
        [title, f"{structure_errors([row], base_row(rows)):.3f}", *_means([row])]
        for title, name in names.items()
        if (row := rows.get(name)) is not None
    ]
    return table(["videos", "structure error", *SCORES, "motion distance"], lines) + "\n"


def _means(rows: Sequence[Row]) -> list[str]:
    values = [values_SV(rows, score) for score in SCORES]
    means = ["no value" if np.isnan(one).all() else f"{np.nanmean(one):.3f}" for one in values]
    return [*means, _distance(rows)]


def _reference(group: Group) -> str:
    return _REFERENCES.get(group, NONE)


def _table(group: Group, rows: Rows, steps: int) -> tuple[str, dict[str, Estimate]]:
    """The reference, then one line per arm against it, over the seeds that both have.

    Returns:
        The table, and each arm's change of the structure error; no changes without results.
    """
    reference = ARM[_reference(group)]
    others = {row["seed"]: row for row in rows_of_arm(rows, reference.name, steps=steps)}
    compared: dict[int, Row] = {}
    lines = []
    changes: dict[str, Estimate] = {}
    for arm in [one for one in ARMS if one.group == group and one is not reference]:
        mine = [row for row in rows_of_arm(rows, arm.name, steps=steps) if row["seed"] in others]
        if not mine:
            continue
        theirs = [others[row["seed"]] for row in mine]
        compared |= {row["seed"]: row for row in theirs}
        change = structure_change(mine, theirs, base_row(rows))
        changes[f"{arm.name} (one seed)" if len(mine) == 1 else arm.name] = change
        lines.append(
            [
                f"{arm.name}: {arm.about}",
                _weight(mine),
                str(len(mine)),
                change.text(),
                *(difference(mine, theirs, score).text() for score in SCORES),
                _distance(mine),
                _auxiliary(mine),
                f"{_loss(mine) - _loss(theirs):+.4f}",
                f"{_seconds(mine) / _seconds(theirs):.2f}x",
            ]
        )
    header = ["arm", "weight", "seeds", "structure error", *SCORES, "motion distance"]
    header += ["auxiliary", "diffusion", "step time"]
    first = [_reference_line(reference, list(compared.values()), base_row(rows))] if lines else []
    return table(header, [*first, *lines]), changes


def _reference_line(arm: Arm, rows: Sequence[Row], base: Row) -> list[str]:
    return [
        f"{arm.name}: {arm.about}",
        _weight(rows),
        str(len(rows)),
        f"{structure_errors(rows, base):.3f} of the base model's",
        *_means(rows),
        _auxiliary(rows),
        f"{_loss(rows):.4f}",
        f"{_seconds(rows):.2f} s",
    ]


def _weight(rows: Sequence[Row]) -> str:
    weight = rows[0]["weight"]
    return "" if weight is None else f"{weight:g}"


def _distance(rows: Sequence[Row]) -> str:
    """Motion distance to the real clips, mean over the seeds if all have one."""
    values = [row["motion_distance"].get("value") for row in rows]
    return "no value" if None in values else f"{np.mean(values):.4f}"


def _auxiliary(rows: Sequence[Row]) -> str:
    """The auxiliary loss on the held-out clips, mean over the seeds; empty without one."""
    values = [sum(row["validation"].get("auxiliary", {}).values()) for row in rows]
    return f"{np.mean(values):.4f}" if all(values) else ""


def _loss(rows: Sequence[Row]) -> float:
    """Diffusion loss on the held-out clips, mean over the seeds."""
    return float(np.mean([row["validation"]["diffusion"] for row in rows]))


def _seconds(rows: Sequence[Row]) -> float:
    """Median duration of a training step."""
    return float(np.median([row["seconds_per_step"] for row in rows]))


def _legend() -> str:
    return (
        "The first line of a table has means over the training seeds of the lines below it. Those "
        "have differences from it, in pairs of clip and training seed, with 95% intervals over "
        "both; bold where the interval leaves out 0. With "
        "one seed an interval is over the clips alone: another seed may well lie outside it. "
        "Structure error: relative change of the mean of 1 - limb_presence, limb_length_error, "
        "joint_gap and extra_pieces, each divided by the base model's. Motion distance: squared "
        "MMD to the real test clips, mean over the seeds. Auxiliary and diffusion: losses on "
        "held-out training clips; the auxiliary one is the arm's own, without its weight. Step "
        "time: median over steps and seeds; the load was not the same for all.\n"
    )


def _draw_changes(file: Path, changes: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Changes of the structure error by table, whose title has a line of its own."""
    lines: list[tuple[str, Estimate | None]] = []
    for title, of_arms in changes.items():
        lines += [(title, None), *of_arms.items()]
    figure, axes = plt.subplots(figsize=(9.0, 0.8 + 0.26 * len(lines)), layout="constrained")
    for row, (_, change) in enumerate(lines):
        if change is not None:
            axes.plot([change.low, change.high], [row, row], color="#5b6770", linewidth=1.5)
            colour = "#2f6f9f" if change.is_decided else "#9aa4ad"
            axes.plot(change.value, row, "o", color=colour)
    axes.axvline(0, color="#c8642b", linewidth=1)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    for label, (_, change) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if change is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("structure error, relative change (95% interval)")
    axes.grid(axis="x", color="#e3e6ea")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_videos(out: Path, rows: Rows, size: Size) -> bool:
    """Some frames of the first test clips: real, and of the base and arms of seed 0 whose videos
    are there."""
    shown = [base_row(rows)]
    for arm in _SHEET_ARMS:
        shown += [row for row in rows_of_arm(rows, arm, steps=size.steps) if row["seed"] == 0]
    folders = {
        row["arm"]: folder
        for row in shown
        if (folder := out / "evaluations" / row["name"] / "videos").is_dir()
    }
    if not folders:
        return False
    strips = []
    for number, seed in enumerate(seeds_of("test", min(_SHEET_CLIPS, size.test_clips), size)):
        videos = {"real": draw_faster_clip(seed, size).frames_THWC}
        videos |= {arm: _video(folder, number) for arm, folder in folders.items()}
        for name, frames_THWC in videos.items():
            strip = Image.fromarray(np.concatenate(frames_THWC[list(_SHEET_FRAMES)], axis=1))
            ImageDraw.Draw(strip).text((4, 2), f"{number}: {name}", fill="white")
            strips.append(np.asarray(strip))
    Image.fromarray(np.concatenate(strips)).save(out / "videos.jpg", quality=85)
    return True


def _video(folder: Path, number: int) -> np.ndarray:
    """The frames of the video that continues a test clip."""
    for file in sorted(folder.rglob("*.json")):
        about: Any = json.loads(file.read_text(encoding="utf-8"))
        if about.get("seed") == number:
            return read_video(file.with_suffix(".mp4"))[0]
    raise ValueError(f"{folder} has no video of clip {number}")
