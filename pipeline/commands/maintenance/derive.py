"""`cache derive gram-flow`: the compact form of the teacher, from its stored features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.maintenance.stores import list_failures_again
from pipeline.commands.skipped_notes import counted_reasons
from pipeline.config.load import RunConfig
from pipeline.console import Answer, in_bytes, in_time
from pipeline.environment import provenance_of_run, rank
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.extract_features.derive import DeriveSummary


def run(config: RunConfig, progress: Progress) -> Answer:
    """Write the Gram-flow store beside the teacher's; several processes may share the shards.

    With `data.buckets`, one of every size.
    """
    from stages.extract_features.derive import derive_gram_flow
    from stages.extract_features.kinds import device_named
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
            device=device_named(config.extract.device, rank()),
            provenance=provenance_of_run(),
            progress=progress,
        )
        rows += _rows(summary, f" {size.size_name}" if len(sizes) > 1 else "")
        data.append({"teacher": str(teacher.path), **_data(summary)})
    crossed = config.extract.gram_flow.pairs == "crossed"
    pairs = " with train.lgf.pairs=crossed" if crossed else ""
    list_failures_again([Path(one["store"]) for one in data], progress)
    return Answer(
        title=f"derived from {', '.join(teacher.name for teacher in teachers)}",
        rows=rows,
        data={"derived": data},
        notes=[f"train.teacher_form=gram_flow{pairs} trains from it"],
    )


def _rows(summary: DeriveSummary, size: str) -> list[tuple[str, str]]:
    there = f", {summary.clips_already_there} already there" if summary.clips_already_there else ""
    reasons = counted_reasons(summary.skipped)
    return [
        (f"gram_flow{size}", str(summary.store)),
        ("  clips", f"{summary.clips_written} written{there}"),
        ("  skipped", f"{len(summary.skipped)} ({reasons})" if summary.skipped else "none"),
        ("  size, time", f"{in_bytes(summary.bytes)}, {in_time(summary.seconds)}"),
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
