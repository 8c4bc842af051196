"""Writes <run_dir>/report.html, one page within itself; training and the command `report` use it.

It opens from the file, without network: curves are SVG and sample videos mp4 in the page itself.
"""

from pathlib import Path
from typing import Any

from cache_schema.atomic_io import write_whole
from stages.train_student.report.figures import figures
from stages.train_student.report.page import (
    facts,
    folded,
    page,
    pictures,
    section,
    table,
    text,
    tiles,
    videos,
)
from stages.train_student.report.pictures import (
    speed_pictures,
    training_pictures,
    validation_pictures,
)
from stages.train_student.report.records import Row, RunRecords, read_run
from stages.train_student.report.videos import Shown, embed, first_and_newest

REPORT_FILE = "report.html"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Make the page of a run, finished or going on.

    Args:
        run_dir: the run's folder.
        out: the file to write; None is `report.html` in the run's folder, which other than
            elsewhere finds the videos that are too large to be part of it.

    Returns:
        The file.

    Raises:
        ValueError: no run, or a damaged one.
    """
    return write_page(read_run(run_dir), out)


def write_page(run: RunRecords, out: Path | None = None) -> Path:
    """The same of a run that has been read."""
    path = out or run.run_dir / REPORT_FILE
    content = render(run).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content, temporary=path.with_name(f".{path.name}.partial"))
    return path


def render(run: RunRecords) -> str:
    """The page's HTML; equal records give equal pages."""
    shown = embed(first_and_newest(run.drawings))
    return page(
        run.run_dir.name,
        _subtitle(run),
        [
            tiles(figures(run)),
            section("Samples", videos(shown), note=_about_samples(run, shown)),
            section("Held-out clips", pictures(validation_pictures(run))),
            section("Training", pictures(training_pictures(run))),
            section("Speed and memory", pictures(speed_pictures(run))),
            section(
                "Skipped steps",
                table(_skipped(run), ("step", "what", "clip", "timestep", "losses")),
                note="Their loss or gradient was no number: nothing was learnt from them.",
            ),
            section(
                "Damaged and gone clips",
                table(run.damaged, ("step", "key", "gone", "message")),
                note="Each was replaced by another clip. Those that are gone were taken out of the "
                "cache during the run; for others sam2vx-pipeline cache repair mends the stores.",
            ),
            section("The run", *_folds(run)),
        ],
    )


def _subtitle(run: RunRecords) -> str:
    settings: dict[str, Any] = run.config.get("train") or {}
    model = (run.config.get("model") or {}).get("path")
    words = [str(model)] if model else []
    if "method" in settings:
        words.append({"lora": "LoRA", "full": "all weights"}.get(settings["method"], ""))
    if "objectives" in settings:
        words.append(" + ".join(["diffusion", *settings["objectives"]]))
    if "batch_size" in settings:
        words.append(f"batch {settings['batch_size']}")
    if "processes" in run.about:
        processes = run.about["processes"]
        words.append("1 process" if processes == 1 else f"{processes} processes")
    return " · ".join(word for word in words if word)


def _skipped(run: RunRecords) -> list[Row]:
    """A line per clip of each skipped step."""
    return [
        {
            "step": row["step"],
            "what": row["what"],
            "clip": clip["key"],
            "timestep": clip["timestep"],
            "losses": [
                f"{name} {value if isinstance(value, str) else f'{value:.4g}'}"
                for name, value in {"diffusion": clip["diffusion"], **clip["auxiliary"]}.items()
            ],
        }
        for row in run.skipped
        for clip in row["clips"]
    ]


def _about_samples(run: RunRecords, shown: dict[str, list[Shown]]) -> str:
    if not shown:
        return ""
    drawn = next(iter(shown.values()))[-1].drawing.drawn
    words = [
        f"{drawn['denoising_steps']} denoising steps",
        f"guidance {drawn['guidance']:g}",
        f"seed {drawn['seed']}",
    ]
    if any(not one.embedded for of_prompt in shown.values() for one in of_prompt):
        words.append("videos too large for this page are links to the run's folder")
    return ", ".join(words) + "."


def _folds(run: RunRecords) -> list[str]:
    rest = {name: value for name, value in run.about.items() if name not in ("settings",)}
    provenance = rest.pop("provenance", {})
    checkpoints = {"complete checkpoints": run.checkpoints} if run.checkpoints else {}
    return [
        folded("Provenance", facts(provenance if isinstance(provenance, dict) else {})),
        folded("Clips, stores, checkpoints", facts(rest | checkpoints)),
        folded("Settings", text(run.config_yaml)),
    ]
