"""`cache derive gram-flow`: compute the Gram-flow store from stored teacher features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.commands.skipped_notes import store_rows
from pipeline.config.load import RunConfig
from pipeline.console import CommandResult, json_values
from pipeline.environment import provenance_of_run, rank, world_size
from stages.progress import Progress


def run(config: RunConfig, progress: Progress) -> CommandResult:
    """Write the Gram-flow store next to the teacher store; several processes may share the shards.

    With `data.buckets`, write one store per size.
    """
    from stages.extract_features.derive import derive_gram_flow
    from stages.extract_features.kinds import resolve_device
    from stages.train_student.data.open_stores import open_store

    folders = config.train.stores.get("teacher", ())
    sizes = config.data.sizes
    teachers = [open_store(config.cache_folder, "teacher", folders, size=size) for size in sizes]
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
            rank=rank(),
            world_size=world_size(),
        )
        rows += store_rows(f"gram_flow{f' {size.size_name}' if len(sizes) > 1 else ''}", summary)
        data.append(
            {
                "teacher": str(teacher.path),
                **json_values(
                    summary, leave_out=("kind", "bucket", "name", "clips", "captions_cut")
                ),
                "skipped": len(summary.skipped),
                "seconds": round(summary.seconds, 3),
            }
        )
    crossed = config.extract.gram_flow.pairs == "crossed"
    pairs = " with train.lgf.pairs=crossed" if crossed else ""
    return CommandResult(
        title=f"derived from {', '.join(teacher.name for teacher in teachers)}",
        rows=rows,
        data={"derived": data},
        notes=[f"to train from it: train.teacher_form=gram_flow{pairs}"],
    )
