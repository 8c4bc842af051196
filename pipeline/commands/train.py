"""`train`: stage two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import RunConfig
from pipeline.console import CommandResult, format_bytes, json_values
from pipeline.environment import provenance_of_run
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.train_student.train import TrainSummary


def run(config: RunConfig, progress: Progress) -> CommandResult:
    """Train, or resume a stopped run."""
    from stages.train_student.logging.rows import DAMAGED_FILE, SKIPPED_FILE
    from stages.train_student.report.figures import (
        best_figures,
        by_name,
        loss_figures,
        speed_figures,
    )
    from stages.train_student.report.records import read_run
    from stages.train_student.report.report import REPORT_FILE
    from stages.train_student.train import train_student

    make_missing_assets(config, progress, reads=("base_model",))
    summary = train_student(
        config.train,
        config.data,
        config.model,
        config.cache_root,
        resolved_config=config.model_dump(mode="json"),
        provenance=provenance_of_run(),
        progress=progress,
    )
    page = summary.run_dir / REPORT_FILE
    records = read_run(summary.run_dir)
    losses, speed = loss_figures(records), speed_figures(records)
    best = best_figures(records)
    data = json_values(summary, left_out="excluded", left_out_by_name="excluded_by_name") | {
        "figures": by_name([*losses, *best, *speed]),
        "page": str(page) if page.is_file() else None,
    }
    rows = [
        ("run", str(summary.run_dir)),
        ("steps", _steps(summary)),
        ("clips", f"{summary.clips}{_excluded(summary.excluded, summary.excluded_by_name)}"),
    ]
    rows += [(one.name, one.text) for one in losses]
    if summary.skipped_steps:
        skipped = f"{summary.skipped_steps}, with a NaN or infinite loss or gradient"
        rows.append(("skipped steps", f"{skipped}; see {SKIPPED_FILE} in the run's folder"))
    unreadable = (("damaged clips", summary.damaged_clips), ("gone clips", summary.gone_clips))
    for name, count in unreadable:
        if count:
            replaced = f"{count}, replaced by other clips; see {DAMAGED_FILE} in the run's folder"
            rows.append((name, replaced))
    rows += [(one.name, one.text) for one in speed]
    rows.append(("peak memory", format_bytes(summary.peak_memory_bytes)))
    rows.append(("weights", str(summary.export)))
    rows += [(one.name, f"{one.text}; export --checkpoint best") for one in best]
    if data["page"] is not None:
        rows.append(("curves, samples", data["page"]))
    return CommandResult(title=f"trained with {config.name}", rows=rows, data=data)


def _steps(summary: TrainSummary) -> str:
    if summary.already_finished:
        return f"{summary.steps_done}, finished before"
    resumed = f", resumed after {summary.resumed_from}" if summary.resumed_from else ""
    return f"{summary.steps_done}{resumed}"


def _excluded(excluded: dict[str, int], by_name: int) -> str:
    listed = [f"{count} of {kind}" for kind, count in excluded.items() if count]
    incomplete = f"; not in every store: {', '.join(listed)}" if listed else ""
    return incomplete + (f"; {by_name} left out by train.leave_out" if by_name else "")
