"""`cache derive gram-flow`: compute the Gram-flow store from stored teacher features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.maintenance.stores import update_failures_file
from pipeline.commands.skipped_notes import count_by_reason
from pipeline.config.load import RunConfig
from pipeline.console import CommandResult, format_bytes, format_time
from pipeline.environment import provenance_of_run, rank
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.extract_features.derive import DeriveSummary


def run(config: RunConfig, progress: Progress) -> CommandResult:
    """Write the Gram-flow store next to the teacher store; several processes may share the shards.

    With `data.buckets`, write one store per size.
    """
    from stages.extract_features.derive import derive_gram_flow
    from stages.extract_features.kinds import resolve_device
    from stages.train_student.data.stores import find_stores

    folders = config.train.stores.get("teacher", ())
    sizes = config.data.sizes
    teachers = [find_stores(config.cache_folder, "teacher", folders, size=size) for size in sizes]
    rows: list[tuple[str, str]] = []
    data: list[dict[str, Any]] = []
    for size, teacher in zip(sizes, teachers, strict=True):
        summary = derive_gram_flow(
            config.cache_folder,
            Path(teacher.path),
            config=config.extract.gram_flow,
            token_grid=size.token_grid,
            device=resolve_device(config.extract.device, rank()),
            provenance=provenance_of_run(),
            progress=progress,
        )
        rows += _rows(summary, f" {size.size_name}" if len(sizes) > 1 else "")
        data.append({"teacher": str(teacher.path), **_data(summary)})
    crossed = config.extract.gram_flow.pairs == "crossed"
    pairs = " with train.lgf.pairs=crossed" if crossed else ""
    update_failures_file([Path(one["store"]) for one in data], progress)
    return CommandResult(
        title=f"derived from {', '.join(teacher.name for teacher in teachers)}",
        rows=rows,
        data={"derived": data},
        notes=[f"to train from it: train.teacher_form=gram_flow{pairs}"],
    )


def _rows(summary: DeriveSummary, size: str) -> list[tuple[str, str]]:
    there = f", {summary.clips_already_there} already there" if summary.clips_already_there else ""
    reasons = count_by_reason(summary.skipped)
    return [
        (f"gram_flow{size}", str(summary.store)),
        ("  clips", f"{summary.clips_written} written{there}"),
        ("  skipped", f"{len(summary.skipped)} ({reasons})" if summary.skipped else "none"),
        ("  size, time", f"{format_bytes(summary.bytes)}, {format_time(summary.seconds)}"),
    ]


def _data(summary: DeriveSummary) -> dict[str, Any]:
    return {
        "store": str(summary.store),
        "clips_written": summary.clips_written,
        "clips_already_there": summary.clips_already_there,
        "skipped": len(summary.skipped),
        "bytes": summary.bytes,
        "seconds": round(summary.seconds, 3),
    }
