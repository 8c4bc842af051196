"""The report page of a run, <run_dir>/report.html.

The page is self-contained and works offline: curves (SVG) and sample videos (mp4) are embedded.
"""

from pathlib import Path
from typing import Any

from cache_schema.atomic_io import write_atomic
from stages.train_student.report.charts import (
    sample_charts,
    speed_charts,
    training_charts,
    validation_charts,
)
from stages.train_student.report.figures import figures
from stages.train_student.report.page import (
    PageVideo,
    charts,
    embed,
    facts,
    folded,
    page,
    section,
    select_videos,
    table,
    text,
    tiles,
    videos,
)
from stages.train_student.report.records import Row, RunRecords, read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report page of a run, finished or in progress.

    Args:
        run_dir: the run's folder.
        out: the file to write; None is `report.html` in the run's folder. Links to videos that are
            too large to embed work only there.

    Returns:
        The file.

    Raises:
        ValueError: there is no run in the folder, or it is damaged.
    """
    return write_page(read_run(run_dir), out)


def write_page(run: RunRecords, out: Path | None = None) -> Path:
    """Write the report page from records that were already read."""
    path = out or run.run_dir / REPORT_FILE
    content = render(run).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return path


def render(run: RunRecords) -> str:
    """Render the page as HTML; equal records give equal pages."""
    best = None if run.best is None else run.best.step
    shown = embed(select_videos(run.samples, best))
    return page(
        run.run_dir.name,
        _subtitle(run),
        [
            tiles(figures(run)),
            section(
                "Samples",
                videos(shown, best),
                charts(sample_charts(run)),
                note=_describe_samples(run, shown),
            ),
            section("Held-out clips", charts(validation_charts(run))),
            section("Training", charts(training_charts(run))),
            section("Speed and memory", charts(speed_charts(run))),
            section(
                "Skipped steps",
                table(_skipped(run), ("step", "what", "clip", "timestep", "losses")),
                note="Their loss or gradient was NaN or infinite, so the weights were not updated.",
            ),
            section(
                "Damaged and gone clips",
                table(run.damaged, ("step", "key", "gone", "message")),
                note="Each was replaced by another clip. Gone clips were removed from the cache "
                "during the run; for damaged ones, run sam2vx-pipeline cache repair.",
            ),
            section("The run", *_details(run)),
        ],
    )


def _subtitle(run: RunRecords) -> str:
    settings: dict[str, Any] = run.config.get("train") or {}
    model = (run.config.get("model") or {}).get("path")
    parts = [str(model)] if model else []
    if "method" in settings:
        parts.append({"lora": "LoRA", "full": "all weights"}.get(settings["method"], ""))
    if "objectives" in settings:
        parts.append(" + ".join(["diffusion", *settings["objectives"]]))
    if "batch_size" in settings:
        parts.append(f"batch {settings['batch_size']}")
    if "processes" in run.about:
        processes = run.about["processes"]
        parts.append("1 process" if processes == 1 else f"{processes} processes")
    return " · ".join(word for word in parts if word)


def _skipped(run: RunRecords) -> list[Row]:
    """One row per clip of each skipped step."""
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


def _describe_samples(run: RunRecords, shown: dict[str, list[PageVideo]]) -> str:
    if not shown:
        return ""
    settings = next(iter(shown.values()))[-1].sample.settings
    parts = [
        f"{settings['denoising_steps']} denoising steps",
        f"guidance {settings['guidance']:g}",
        f"seed {settings['seed']}",
    ]
    if any(not video.embedded for of_prompt in shown.values() for video in of_prompt):
        parts.append("videos too large to embed are linked from the run's folder")
    return ", ".join(parts) + "."


def _details(run: RunRecords) -> list[str]:
    rest = {name: value for name, value in run.about.items() if name not in ("settings",)}
    provenance = rest.pop("provenance", {})
    checkpoints = {"complete checkpoints": run.checkpoints} if run.checkpoints else {}
    return [
        folded("Provenance", facts(provenance if isinstance(provenance, dict) else {})),
        folded("Clips, stores, checkpoints", facts(rest | checkpoints)),
        folded("Settings", text(run.config_yaml)),
    ]
